"""Ranks meet, or those that did not come are named."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from mmfusion.tools.plan.rendezvous import Place, RendezvousError, meet, meet_here, place_of
from tests.training.tiny import write_recipe

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "host1", "MASTER_PORT": "29500"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_launcher_says_where_a_process_stands():
    assert place_of({**LAUNCHED, "LOCAL_RANK": "1"}) == Place(3, 8, 1, "host1", 29500, keeps=False)
    assert place_of({**LAUNCHED, "RANK": "0"}).keeps
    agent = {**LAUNCHED, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert not place_of(agent).keeps  # torchrun's agent does


def test_without_a_launcher_there_is_none(monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert place_of({"MASTER_ADDR": "host1"}) is None


def test_a_rank_whose_store_does_not_answer_says_so():
    place = Place(1, 2, 0, "127.0.0.1", free_port(), keeps=False)
    with pytest.raises(
        RendezvousError, match=r"rank 1: the store of rank 0 at 127.0.0.1:\d+ cannot be had"
    ):
        meet(place, 2)


def test_a_rank_that_does_not_come_is_named():
    place = Place(0, 3, 0, "127.0.0.1", free_port(), keeps=True)
    with pytest.raises(
        RendezvousError, match=r"ranks 1, 2 of 3 did not come within 1 s.*rank 0 came"
    ):
        meet(place, 1)


@pytest.mark.slow
def test_processes_on_this_machine_meet():
    assert meet_here(3) == "3 ranks met and summed over gloo on this machine"


@pytest.mark.slow
def test_a_process_that_is_not_started_is_named():
    with pytest.raises(
        RendezvousError, match=r"rank 1 of 3 did not come within 20 s.*ranks 0, 2 came"
    ):
        meet_here(3, 20, leave_out=[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plan_under_torchrun_is_told_once(tmp_path):
    recipe = write_recipe(tmp_path)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmfusion"]
    options = ["plan", str(recipe), "--gpus=2", "--test", "--test_seconds=300"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks met and summed over gloo") == 1
    assert done.stdout.count("deepspeed_3_offload") > 0


@pytest.mark.slow
def test_processes_of_torchrun_meet():
    code = "import os\nfrom mmfusion.tools.plan.rendezvous import meet, place_of\n"
    code += "print(meet(place_of(os.environ), 120))"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [sys.executable, *command, sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.stdout.count("2 ranks met and summed over gloo") == 2, done.stderr
