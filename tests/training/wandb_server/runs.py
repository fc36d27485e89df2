"""Runs: made, resumed, and the lines that are streamed into them."""

from __future__ import annotations

import base64
import json
from typing import Any

RUNS: dict[str, dict[str, Any]] = {}
SENT: dict[tuple[str, str, str], set[int]] = {}
"""Numbers of lines, by client, run and file."""
PROJECT = {
    "id": "P1",
    "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==",  # ProjectInternalId:1
    "name": "mmfusion",
    "entity": {"id": "E1", "name": "us"},
}
STREAMS = {
    "wandb-history.jsonl": "history",
    "wandb-events.jsonl": "events",
    "output.log": "logs",
}


def run_of(name: str) -> dict[str, Any]:
    """The run of this name, made where it is new."""
    number = base64.b64encode(f"Run:v1:{name}".encode()).decode()
    new = {"id": number, "name": name, "displayName": name, "config": "{}", "project": PROJECT}
    lines: dict[str, Any] = {key: [] for key in STREAMS.values()}
    rest = {"summary": {}, "sweep": None, "complete": None, "exitcode": None}
    return RUNS.setdefault(name, {"bucket": new, **lines, **rest})


def resume_status(variables: dict[str, Any]) -> dict[str, Any]:
    """What a client asks before it makes a run: null, or how much of it is there."""
    if variables["name"] not in RUNS:
        return {"model": {**PROJECT, "bucket": None}}
    run = RUNS[variables["name"]]
    counts = {
        "historyLineCount": len(run["history"]),
        "eventsLineCount": len(run["events"]),
        "logLineCount": len(run["logs"]),
    }
    tails = {
        "historyTail": json.dumps(run["history"][-1:]),
        "eventsTail": json.dumps(run["events"][-1:]),
    }
    rest = {"summaryMetrics": json.dumps(run["summary"]), "tags": [], "notes": None}
    bucket = {**run["bucket"], **counts, **tails, **rest, "wandbConfig": '{"t": 1}'}
    return {"model": {**PROJECT, "bucket": bucket}}


def upsert(variables: dict[str, Any]) -> dict[str, Any]:
    """Make or change a run."""
    ids = {run["bucket"]["id"]: name for name, run in RUNS.items()}
    name = variables.get("name") or ids[variables["id"]]
    new = name not in RUNS
    run = run_of(name)
    for key in ("config", "displayName"):
        if variables.get(key) is not None:
            run["bucket"][key] = variables[key]
    if variables.get("summaryMetrics"):
        run["summary"] = json.loads(variables["summaryMetrics"])
    run["sweep"] = variables.get("sweep") or run["sweep"]
    bucket = {**run["bucket"], "description": None, "sweepName": run["sweep"]}
    return {"upsertBucket": {"bucket": bucket, "inserted": new}}


def take_lines(name: str, content: dict[str, Any], client: str | None) -> None:
    """Keep what is streamed. A client alone says which lines it sends. Those that share a run
    number theirs each for itself: they are appended, and the summary is made of them.
    """
    run = run_of(name)
    for file, chunk in (content.get("files") or {}).items():
        if file == "wandb-summary.json" and client is None:
            run["summary"] = json.loads(chunk["content"][-1])
        if file not in STREAMS:
            continue
        kept, first, lines = run[STREAMS[file]], chunk["offset"], chunk["content"]
        if client is None:
            kept[first : first + len(lines)] = lines
            continue
        sent = SENT.setdefault((client, name, file), set())
        kept += [line for number, line in enumerate(lines, first) if number not in sent]
        sent.update(range(first, first + len(lines)))
        for line in lines if file == "wandb-history.jsonl" else []:
            run["summary"].update(json.loads(line))
    if content.get("complete") is not None:
        run["complete"], run["exitcode"] = content["complete"], content.get("exitcode")


def answer(operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
    """GraphQL, by the name of the operation; None for those of others."""
    if operation == "UpsertBucket":
        return upsert(variables)
    if operation == "RunResumeStatus":
        return resume_status(variables)
    if operation == "CreateRunFiles":
        files = [
            {"name": file, "uploadUrl": f"{variables['base']}/storage/{variables['run']}/{file}"}
            for file in variables["files"]
        ]
        number = run_of(variables["run"])["bucket"]["id"]
        return {"createRunFiles": {"runID": number, "uploadHeaders": [], "files": files}}
    if operation == "RunStoppedStatus":
        return {"project": {"run": {"stopped": False}}}
    return None
