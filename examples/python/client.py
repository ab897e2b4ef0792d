"""Trains a soft prompt on an Incipit cluster, and fetches it: the whole of the API's life of a job, in one file.

    python client.py --backbone base --train train.jsonl --eval dev.jsonl --steps 200 --out prompt.safetensors

There is no generated code here. The coordinator describes its own messages (gRPC server reflection), so that this file works with
whatever version of it is running; the same descriptions, with comments, are in proto/incipit/v1. Read `main` first.
"""

import argparse
import os
import pathlib
import sys
import threading
import time
import uuid

import grpc
from blake3 import blake3
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

PART = 1 << 20  # Bytes of a blob that go into one message, at most.
PATIENCE = 60  # Seconds for which we go on trying when the coordinator is away; it comes back with everything that it has acknowledged.


# ---------------------------------------------------------------------------------------------------------------- what happens here


def main():
    args = arguments()
    cluster = Cluster(args.coordinator, os.environ.get("INCIPIT_TOKEN"), args.ca)
    info = cluster.call("EventService", "GetServerInfo")
    say(f"cluster {info.cluster_id}, version {info.version}")

    job = cluster.call(
        "JobService",
        "CreateJob",
        job_id=args.name or "",
        job={
            "backbone": f"backbones/{args.backbone}",
            # The same fields as `incipit train --config`; whatever is left out has the default of the paper's recipe.
            "spec": {
                "train": upload(cluster, args.train),
                "eval": upload(cluster, args.eval),
                "steps": args.steps,
                "prompt_length": args.prompt_length,
                "batch_size": args.batch_size,
                "eval_every": args.eval_every,
                "checkpoint_every": args.eval_every,
            },
            "labels": {"made-by": "client.py"},
        },
        # If the connection breaks before the answer, `call` asks again with the same id, and there will be one job, not two.
        request_id=str(uuid.uuid4()),
    )
    say(f"{job.name} is accepted: from now on it survives any crash")

    # Two streams about one job: what becomes of it, beside what it measures. Both go on where they were if they break.
    threading.Thread(target=watch, args=(cluster, job.name, info.revision + 1), daemon=True).start()
    for point in metrics(cluster, job.name):
        show(point)

    job = cluster.call("JobService", "GetJob", name=job.name)
    state = cluster.enum("JobState", job.state)
    if state != "SUCCEEDED":
        sys.exit(f"{job.name} ended as {state}: {job.message}")
    best = cluster.call("CheckpointService", "GetCheckpoint", name=f"{job.name}/checkpoints/best")
    say(f"the best prompt is that of step {best.step}, score {best.score:.4f}")
    file = next(file for file in best.files if file.name == "prompt.safetensors")
    download(cluster, file, args.out)
    print(args.out)


def arguments():
    parser = argparse.ArgumentParser(description="Train a soft prompt on an Incipit cluster, and fetch it.")
    parser.add_argument("--coordinator", default=os.environ.get("INCIPIT_COORDINATOR", "http://127.0.0.1:7420"), metavar="URL")
    parser.add_argument("--ca", default=os.environ.get("INCIPIT_CA"), metavar="FILE", help="ca.pem, where the URL is https")
    parser.add_argument("--backbone", required=True, help="which resident model to train on (incipit backbone list)")
    parser.add_argument("--train", required=True, type=pathlib.Path, help="JSONL with the fields inputs and targets")
    parser.add_argument("--eval", required=True, type=pathlib.Path, help="the same; chooses the best checkpoint")
    parser.add_argument("--name", help="of the job; made up if it is left out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("prompt.safetensors"))
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------------- data, up and down


def upload(cluster, path):
    """Has a file in the coordinator's store, and returns a DataSource that names it. What is there already is not sent again."""
    content = path.read_bytes()
    digest = blake3(content).hexdigest()
    if cluster.call("BlobService", "FindBlobs", digests=[digest]).missing:

        def parts():
            yield {"digest": digest, "size": len(content)}
            for start in range(0, len(content), PART):
                yield {"data": content[start : start + PART]}

        cluster.call("BlobService", "WriteBlob", parts)
        say(f"uploaded {path} ({len(content)} bytes)")
    return {"digest": digest, "file_name": path.name}


def download(cluster, file, path):
    """Fetches a file of a checkpoint. It is at `path` once it is whole and its BLAKE3 is right, and never before."""
    part = path.with_name(path.name + ".part")
    hasher, done = blake3(), 0
    with open(part, "wb") as out:
        # Where the stream breaks, it goes on at the first byte that is missing.
        for message in cluster.stream("BlobService", "ReadBlob", lambda: {"digest": file.digest, "offset": done}):
            out.write(message.data)
            hasher.update(message.data)
            done += len(message.data)
    if done != file.size or hasher.hexdigest() != file.digest:
        part.unlink()
        raise ValueError(f"{file.name} arrived damaged: {done} of {file.size} bytes, BLAKE3 {hasher.hexdigest()}, expected {file.digest}")
    os.replace(part, path)


# ---------------------------------------------------------------------------------------------------------------------- following a job


def metrics(cluster, name):
    """Every point that the job measured, once, until it ends. A step that was made twice after a crash is one point."""
    offset = 0
    for message in cluster.stream("JobService", "StreamMetrics", lambda: {"name": name, "offset": offset, "follow": True}):
        yield from message.points
        offset = message.next_offset


def watch(cluster, name, revision):
    """Prints what becomes of the job: its state, why, and its checkpoints."""
    last = None
    while True:
        try:
            for message in cluster.stream("EventService", "WatchEvents", lambda: {"start_revision": revision, "name_prefixes": [name]}):
                for event in message.events:
                    kind = cluster.enum("EventKind", event.kind)
                    if event.name == name:  # and not jobs/a-2, which begins with jobs/a
                        state, why = cluster.enum("JobState", event.job.state), cluster.enum("JobReason", event.job.reason)
                        if (state, why) != last:
                            say(f"{name} is {state} ({why}){': ' if event.job.message else ''}{event.job.message}")
                        last = (state, why)
                    elif event.name.startswith(name + "/checkpoints/") and kind == "CREATED":
                        say(f"{event.name} is saved")
                revision = message.next_revision
            return
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.OUT_OF_RANGE:
                say(f"no more events: {error.details()}")
                return
            # We were away for so long that the events are gone. What is now, we know from the resource; go on from here.
            revision = cluster.call("EventService", "GetServerInfo").revision + 1


def show(point):
    if point.WhichOneof("point") == "training":
        print(f"step {point.step:6}  loss {point.training.loss:.4f}  lr {point.training.lr:.3g}", flush=True)
    else:
        named = "  ".join(f"{name} {value:.4f}" for name, value in sorted(point.evaluation.metrics.items()))
        print(f"step {point.step:6}  {named}{'  best so far' if point.evaluation.best else ''}", flush=True)


def say(text):
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- gRPC without generated code


class Cluster:
    """A connection to a coordinator. Requests are keyword arguments (or dicts), answers are protobuf messages."""

    def __init__(self, url, token=None, ca=None):
        scheme, _, address = url.partition("://")
        if scheme == "https":
            channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(pathlib.Path(ca).read_bytes() if ca else None))
        elif scheme == "http":
            channel = grpc.insecure_channel(address)
        else:
            sys.exit(f"{url} is no URL of a coordinator: give http://HOST:PORT or https://HOST:PORT")
        if token:
            channel = grpc.intercept_channel(channel, Token(token))
        self.channel = channel
        # Asks the server for a description when one is first needed, and then keeps it.
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))

    def call(self, service, method, parts=None, **fields):
        """Calls a method that answers once. It is tried again while the coordinator is away."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                call, request = self._method(service, method)
                return call((request(**part) for part in parts()) if parts else request(**fields), timeout=None if parts else 30)
            except grpc.RpcError as error:
                pause_or_raise(error, until)

    def stream(self, service, method, fields):
        """Calls a method that answers with a stream. `fields` is asked anew after each break, so that it can say where to go on."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                call, request = self._method(service, method)
                for message in call(request(**fields())):
                    until = time.monotonic() + PATIENCE
                    yield message
                return
            except grpc.RpcError as error:
                pause_or_raise(error, until)

    def enum(self, name, value):
        """JOB_STATE_RUNNING is RUNNING: without the type's own name before it."""
        kind = self.pool.FindEnumTypeByName(f"incipit.v1.{name}")
        prefix = "".join("_" + letter if letter.isupper() else letter.upper() for letter in name).lstrip("_") + "_"
        known = kind.values_by_number.get(value)
        return known.name.removeprefix(prefix) if known else str(value)

    def _method(self, service, method):
        described = self.pool.FindServiceByName(f"incipit.v1.{service}").methods_by_name[method]
        request = message_factory.GetMessageClass(described.input_type)
        answer = message_factory.GetMessageClass(described.output_type)
        kind = ("stream" if described.client_streaming else "unary", "stream" if described.server_streaming else "unary")
        make = getattr(self.channel, "_".join(kind))  # unary_unary, unary_stream, stream_unary
        call = make(
            f"/incipit.v1.{service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )
        return call, request


def pause_or_raise(error, until):
    """UNAVAILABLE is for "not now"; RESOURCE_EXHAUSTED for "too fast". All else would be the same again."""
    passing = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    if not passing or time.monotonic() > until:
        raise error
    say(f"trying again: {error.details()}")
    time.sleep(1)


class Token(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Shows the token on every call, reflection's included."""

    def __init__(self, token):
        self.metadata = [("authorization", f"Bearer {token}")]

    def _with_token(self, proceed, details, request):
        details = details._replace(metadata=list(details.metadata or []) + self.metadata)
        return proceed(details, request)

    intercept_unary_unary = intercept_unary_stream = _with_token
    intercept_stream_unary = intercept_stream_stream = _with_token


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(f"error: {error.code().name}: {error.details()}")
    except KeyboardInterrupt:
        sys.exit("left; the job goes on")
