"""Renders a folder of manifests as `kubectl apply -k` would, and checks every object against its schema, strictly.

    python check.py FOLDER

Prints the objects as a JSON array. `kubectl` is the one beside this Python.
"""

import json
import pathlib
import subprocess
import sys

import jsonschema
import kubernetes_validate
import yaml

VERSION = "1.37"


def main():
    kubectl = pathlib.Path(sys.executable).parent / "kubectl"
    rendered = subprocess.run([kubectl, "kustomize", sys.argv[1]], check=True, capture_output=True, text=True).stdout
    objects = list(yaml.safe_load_all(rendered))
    schema = json.loads((pathlib.Path(__file__).parent / "jobset.schema.json").read_text())
    for thing in objects:
        if thing["kind"] == "JobSet":
            jsonschema.validate(thing, schema)
            for job in thing["spec"]["replicatedJobs"]:
                name = {"name": f"{thing['metadata']['name']}-{job['name']}-0"}
                check({"apiVersion": "batch/v1", "kind": "Job", "metadata": name, "spec": job["template"]["spec"]})
        else:
            check(thing)
    json.dump(objects, sys.stdout)


def check(thing):
    kubernetes_validate.validate(thing, VERSION, strict=True)


if __name__ == "__main__":
    main()
