# Network and library settings of every process of a run. Sourced by the scripts beside it; `mmfusion launch` copies it
# into what it submits. Each line keeps a value that is set already.

# --- torch
# In torch 2.13 a rendezvous' store outlives a restart with the old address of rank 0 in it: restarts fail by chance.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# Threads of each process, else each takes all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-4}}
# Longer packs now and then would else leave holes in the GPU's memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# --- NCCL
# A rank that waits in vain ends with an error instead of waiting on; --timeout_minutes of mmfusion fit says how long.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# What it reports of its set-up: WARN, or INFO where a network is to be found out about.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Which interface carries the set-up and, without InfiniBand, the data, where a node has several networks:
# export NCCL_SOCKET_IFNAME=eth0
# InfiniBand adapters, where not all may be used: export NCCL_IB_HCA=mlx5_0,mlx5_1
# RoCE networks want the index of their global identifier: export NCCL_IB_GID_INDEX=3
# No InfiniBand although there are adapters: export NCCL_IB_DISABLE=1

# --- gloo, of CPU processes: one interface by name, where the host's name does not lead to the right one
# export GLOO_SOCKET_IFNAME=eth0

# --- Hugging Face: nothing is looked up in the midst of a run where all weights are in the cache
# export HF_HUB_OFFLINE=1
