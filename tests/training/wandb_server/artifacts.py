"""Artifacts: versions of files, made and used by runs."""

from __future__ import annotations

import json
from typing import Any

from tests.training.wandb_server.runs import PROJECT

ARTIFACTS: dict[str, dict[str, Any]] = {}


def keep(path: str, body: bytes) -> None:
    """What the manifest of an artifact names."""
    _, storage, kind, number, *_ = path.split("/")
    if (storage, kind) == ("storage", "manifest"):
        ARTIFACTS[number]["manifest"] = json.loads(body)


def make(given: dict[str, Any]) -> dict[str, Any]:
    """A new version; the known one where the content is the same."""
    collection, digest = given["artifactCollectionName"], given["digest"]
    versions = [a for a in ARTIFACTS.values() if a["collection"] == collection]
    made = next((a for a in versions if a["digest"] == digest), None)
    if made is None:
        made = {
            "id": f"A{len(ARTIFACTS) + 1}", "collection": collection, "digest": digest,
            "type": given["artifactTypeName"], "state": "PENDING", "version": len(versions),
            "metadata": json.loads(given.get("metadata") or "null"), "made_by": given["runName"],
            "used_by": [], "aliases": [], "clients": [], "manifest": None,
            "description": given.get("description"),
        }  # fmt: skip
        ARTIFACTS[made["id"]] = made
    for alias in (entry["alias"] for entry in given.get("aliases") or []):
        for other in versions:
            other["aliases"] = [a for a in other["aliases"] if a != alias]
        made["aliases"].append(alias)
    made["clients"].append(given.get("clientID"))
    sequence = {"id": "Q" + collection, "latestArtifact": None}
    return {"id": made["id"], "state": made["state"], "artifactSequence": sequence}


def described(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """As the public API shows it: the artifact, and its place in its collection."""
    sequence = {
        "__typename": "ArtifactSequence", "id": "Q" + found["collection"],
        "name": found["collection"], "project": PROJECT,
    }  # fmt: skip
    aliases = [
        {"id": f"L{i}", "alias": alias, "artifactCollection": sequence}
        for i, alias in enumerate(found["aliases"])
    ]
    artifact = {
        "id": found["id"], "artifactSequence": sequence, "versionIndex": found["version"],
        "artifactType": {"id": "T", "name": found["type"]}, "description": None,
        "metadata": json.dumps(found["metadata"]), "aliases": aliases, "tags": [],
        "ttlDurationSeconds": -2, "ttlIsInherited": True, "state": found["state"], "size": 1,
        "digest": found["digest"], "commitHash": "c", "fileCount": 1, "historyStep": None,
        "createdAt": "2026-01-01T00:00:00", "updatedAt": None, "currentManifest": None,
        "artifactMembership": None,
    }  # fmt: skip
    membership = {
        "id": "M1", "artifact": artifact, "artifactCollection": sequence, "aliases": aliases,
        "versionIndex": found["version"], "createdAt": "2026-01-01T00:00:00",
    }  # fmt: skip
    return artifact, membership


def by_name(name: str) -> dict[str, Any]:
    """``collection:alias``."""
    collection, _, alias = name.partition(":")
    for found in ARTIFACTS.values():
        if found["collection"] == collection and alias in found["aliases"]:
            artifact, membership = described(found)
            return {"project": {"artifactCollectionMembership": membership, "artifact": artifact}}
    return {"project": {"artifactCollectionMembership": None, "artifact": None}}


def answer(operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
    """GraphQL, by the name of the operation; None for those of others."""
    given = variables.get("input") or variables
    if operation == "CreateArtifact":
        return {"createArtifact": {"artifact": make(given)}}
    if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
        number = str(given.get("artifactID") or given.get("artifactManifestID", "")[1:])
        url = f"{variables['base']}/storage/manifest/{number}"
        file = {"id": "F", "uploadUrl": url, "uploadHeaders": []}
        return {
            operation[0].lower() + operation[1:]: {
                "artifactManifest": {"id": "M" + number, "file": file}
            }
        }
    if operation == "CreateArtifactFiles":
        nodes = [
            {
                "id": "AF", "name": file["name"], "displayName": file["name"],
                "storagePath": None, "uploadHeaders": [], "uploadMultipartUrls": None,
                "uploadUrl": f"{variables['base']}/storage/artifact/{file['artifactID']}/"
                f"{file['name']}",
                "artifact": {"id": file["artifactID"]},
            }
            for file in given["artifactFiles"]
        ]  # fmt: skip
        edges = [{"node": node} for node in nodes]
        return {"createArtifactFiles": {"files": {"edges": edges}}}
    if operation == "CommitArtifact":
        artifact = ARTIFACTS[given["artifactID"]]
        artifact["state"] = "COMMITTED"
        shown = {"id": artifact["id"], "digest": artifact["digest"]}
        return {"commitArtifact": {"artifact": shown}}
    if operation == "UseArtifact":
        ARTIFACTS[given["artifactID"]]["used_by"].append(given["runName"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}
    if operation == "ClientIDMapping":
        numbers = (a["id"] for a in ARTIFACTS.values() if variables["clientID"] in a["clients"])
        return {"clientIDMapping": {"serverID": next(numbers, None)}}
    if operation == "ArtifactType":
        return {"project": {"artifact": None}}
    if operation == "ArtifactMembershipByName":
        return by_name(variables["name"])
    if operation == "ArtifactByID":
        return {"artifact": described(ARTIFACTS[variables["id"]])[0]}
    return None
