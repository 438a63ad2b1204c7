"""What people watch: loggers of other packages, which stand-ins show, and the use of the device."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import watch

import jlora


class Calls:
    """A module that records what is called."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            self.seen.append((name, args, more))
            return self

        return call

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.seen.append(("close", (), {}))


def test_loggers_get_every_step_and_evaluation(
    job: Any, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, wandb = Calls(), Calls()
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert job(tmp_path, "--log", "tensorboard", "--eval-every", "3") == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scalars = [args for name, args, _ in board.seen if name == "add_scalar"]
    for line in lines:
        step = line.pop("step")
        assert all((name, value, step) in scalars for name, value in line.items())
    assert len(scalars) == sum(map(len, lines)) and not wandb.seen
    assert board.seen[0] == ("SummaryWriter", (str(tmp_path / "tensorboard"),), {})

    args = types.SimpleNamespace(log=["wandb"], out=tmp_path, lr=0.1, data=None)
    with watch.loggers(args) as (log,):
        log(3, {"step": 3, "loss": 0.5})
    assert wandb.seen[0][2]["config"]["lr"] == "0.1" and "data" not in wandb.seen[0][2]["config"]
    assert wandb.seen[1] == ("log", ({"loss": 0.5},), {"step": 3})
    assert board.seen[-1][0] == wandb.seen[-1][0] == "close"


def scalars(data: bytes) -> dict[tuple[str, int], float]:
    """The scalars of an event file: a length, its checksum, an event, its checksum; and so on."""
    from tensorboardX.proto.event_pb2 import Event

    found, at = {}, 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        given = (x for x in event.summary.value if x.HasField("simple_value"))
        found |= {(x.tag, event.step): x.simple_value for x in given}
        at += size + 16
    return found


def history(data: bytes) -> dict[tuple[str, int], float]:
    """The numbers of wandb's file: LevelDB's log of records, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, at, record = {}, 7, b""
    while at < len(data):
        if (left := -at % 32768) < 7:  # no record begins in the last bytes of a block
            at += left
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record = (record if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # complete, or the last part of one
            items = Record.FromString(record).history.item
            row = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items}
            found |= {(name, row["_step"]): x for name, x in row.items() if name[0] != "_"}
    return found


@pytest.mark.live
def test_the_packages_get_the_numbers(job: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Every number of metrics.jsonl is in their files; TensorBoard rounds to float32."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert job(tmp_path, "--log", "tensorboard", "wandb", "--eval-every", "3") == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    want = {
        (name, x["step"]): value for x in lines for name, value in watch.named_numbers(x).items()
    }
    (events,), (run,) = (
        [*tmp_path.glob(pattern)] for pattern in ("tensorboard/*", "wandb/offline-*/*.wandb")
    )
    assert scalars(events.read_bytes()) == pytest.approx(want, rel=1e-6)
    assert history(run.read_bytes()) == want


def test_a_package_that_is_missing_is_named_before_anything_is_written(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, module in watch.MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)  # an ImportError
        assert job(tmp_path / "out", "--log", name) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"`--log {name}`: {module} is not installed" in error
        assert f"Run pip install {module}, or leave it out" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_kind(kind: str, peak: float | None) -> None:
    assert watch.peak_of(kind) == peak


def test_utilization_is_of_the_products_and_of_all_devices(monkeypatch: Any) -> None:
    base = {"embed": jnp.ones((50, 8)), "w": jnp.ones((8, 6)), "scale": jnp.ones(8)}
    params = jlora.attach(base, {"w": jlora.LoraSpec(2)}, key=jax.random.key(0))
    trainable, frozen = jlora.partition(params)
    assert watch.flops_of_token(trainable, frozen, False) == 4 * 48 + 6 * (16 + 12)
    assert watch.flops_of_token(trainable, frozen, True) == 4 * (400 + 48) + 6 * 28
    assert watch.utilization(1e9, 1e3) == {}
    devices = [types.SimpleNamespace(device_kind="TPU v4")] * 2
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert watch.utilization(2.75e9, 1e5) == {"mfu": pytest.approx(0.5)}
