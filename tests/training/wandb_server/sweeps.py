"""Sweeps: a file of parameters, and agents that ask what to run. The grid alone is known."""

from __future__ import annotations

import itertools
import json
from typing import Any

import yaml

from tests.training.wandb_server.runs import PROJECT

SWEEPS: dict[str, dict[str, Any]] = {}
AGENTS: dict[str, str] = {}


def grid(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The values of each run."""
    parameters = {
        name: one.get("values", [one.get("value")]) for name, one in config["parameters"].items()
    }
    return [
        dict(zip(parameters, values, strict=True))
        for values in itertools.product(*parameters.values())
    ]


def commands(agent: str, states: dict[str, bool]) -> list[dict[str, Any]]:
    """A run, where it has none; the end, where there is no more."""
    sweep = SWEEPS[AGENTS[agent]]
    if states:
        return []
    if not sweep["left"]:
        return [{"type": "exit"}]
    number = f"trial{len(sweep['given'])}"
    values = sweep["left"].pop(0)
    sweep["given"][number] = values
    return [
        {
            "id": f"C{number}",
            "type": "run",
            "run_id": number,
            "program": yaml.safe_load(sweep["config"]).get("program"),
            "args": {name: {"value": value} for name, value in values.items()},
        }
    ]


def answer(operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
    """GraphQL, by the name of the operation; None for those of others."""
    if operation == "UpsertSweep":
        name = f"sweep{len(SWEEPS)}"
        left = grid(yaml.safe_load(variables["config"]))
        SWEEPS[name] = {"config": variables["config"], "left": left, "given": {}}
        made = {"name": name, "project": PROJECT}
        return {"upsertSweep": {"sweep": made, "configValidationWarnings": []}}
    if operation == "SweepWithRuns":
        sweep = {"name": variables["sweep"], "config": SWEEPS[variables["sweep"]]["config"]}
        return {"project": {"sweep": {**sweep, "state": "RUNNING", "runs": {"edges": []}}}}
    if operation == "CreateAgent":
        number = f"agent{len(AGENTS)}"
        AGENTS[number] = variables["sweep"]
        return {"createAgent": {"agent": {"id": number}}}
    if operation == "Heartbeat":
        found = commands(variables["id"], json.loads(variables["runState"]))
        shown = {"agent": {"id": variables["id"]}, "commands": json.dumps(found)}
        return {"agentHeartbeat": shown}
    return None
