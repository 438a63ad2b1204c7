"""The main job on a mesh of eight devices does what it does on one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import begin
import dpo
import finetune
import jax
import job_process
import numpy as np
import placing
import plan
import pytest
import states
import training
import weights
from flags import parse
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tiny_gguf import write_gguf
from tiny_llama import TINY, write_model

import jlora
from jlora import checkpoint

MESH = ("--mesh", "fsdp=2,tp=4")


class Trained(NamedTuple):
    """What `finetune.train` was given, and what it returned."""

    model: str
    job: Any
    programs: Any
    frozen: Any
    before: Any
    after: Any


@pytest.fixture(scope="module")
def meshed(job: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """A run on a mesh that was stopped after step 3, and what it trained."""
    out, found, train, advance = (
        tmp_path_factory.mktemp("meshed"),
        [],
        finetune.train,
        training.advance,
    )

    def seen(args: Any, job: Any, programs: Any, frozen: Any, state: Any, *rest: Any) -> Any:
        places = jax.tree.map(lambda x: x.sharding, state[:2])  # the steps donate the arrays
        after = train(args, job, programs, frozen, state, *rest)
        found.append(Trained(args.model, job, programs, frozen, places, after))
        return after

    def signaled(function: Any, state: Any, *rest: Any) -> Any:
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return advance(function, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "train", seen)
        patch.setattr(training, "advance", signaled)
        assert job(out, *MESH, "--eval-every", "2") == 0
    return out, found[0]


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] if "loss" in line else line["held_out_loss"] for line in lines]


def same(a: Path, b: Path, count: int, step: int = 6) -> None:
    """Assert that two runs have the same losses and adapter to 1e-5, and nearly the same moments.

    The arrays of a state are the `count` ones of the adapter, a number, and their moments. One
    entry in a thousand may be further away: Adam divides by the root of the second moment, also
    where a gradient is zero but for rounding.
    """
    np.testing.assert_allclose(losses(b), losses(a), rtol=1e-5)
    one, two = (load_file(out / "state" / f"{step}.safetensors") for out in (a, b))
    assert one.keys() == two.keys() and len(one) > 3 * count
    apart = [abs(one[str(n)] - two[str(n)]).ravel() for n in range(count)]
    most = np.concatenate(apart)
    assert (most > 1e-5).mean() < 1e-3 and most.max() < 1e-4
    for n in range(count + 1, 3 * count + 1):
        most = float(abs(one[str(n)]).max())
        np.testing.assert_allclose(two[str(n)], one[str(n)], rtol=0, atol=1e-4 * most)


def test_weights_adapter_and_moments_are_where_the_rules_say(meshed: Any) -> None:
    _, (_, job, _, frozen, _, state) = meshed
    node = job.params["layers_0"]["attn"]["o_proj"]["kernel"]
    specs = [x.sharding.spec for x in (node.base, node.lora_a, node.lora_b)]
    assert specs == [P("tp", "fsdp"), P("tp", None), P(None, None)]
    node = job.params["layers_1"]["mlp"]["up_proj"]["kernel"]
    specs = [x.sharding.spec for x in (node.base, node.lora_a, node.lora_b)]
    assert specs == [P("fsdp", "tp"), P(None, None), P(None, "tp")]
    assert job.params["embed"]["embedding"].sharding.spec == P("tp", "fsdp")
    matrices = [x for x in jax.tree.leaves(frozen) if x.ndim > 1]
    assert len(matrices) == 16
    for x in matrices:
        assert len(x.sharding.device_set) == 8
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // 8}
    moments = state.opt_state[1][0].mu["layers_1"]["mlp"]["up_proj"]["kernel"]
    specs = [x.sharding.spec for x in (moments.lora_a, moments.lora_b)]
    assert specs == [P(None, None), P(None, "tp")]


def test_what_is_read_is_where_it_was(meshed: Any, tmp_path: Path) -> None:
    """A state, and an adapter that is restored."""
    out, (model, job, _, frozen, _, state) = meshed
    read = states.read_state(out / "state" / "3.safetensors", state)
    checkpoint.save(tmp_path / "adapter", jlora.combine(state.trainable, frozen))
    args = parse(["--model", model, "--rank", "4", *MESH, "--out", str(tmp_path)])
    restored = begin.restore(args, begin.load_model(args)[1])
    for found, like in ((read[:2], state[:2]), (read.best, state.best), (restored, job.params)):
        for a, b in zip(*map(jax.tree.leaves, (found, like)), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_one_program_takes_its_own_results(meshed: Any) -> None:
    """The step was compiled once and refuses other shardings; it writes over what it was given."""
    _, (_, job, programs, _, before, state) = meshed
    assert isinstance(programs.step, jax.stages.Compiled) and state.step == 3
    after = jax.tree.map(lambda x: x.sharding, state[:2])
    assert jax.tree.all(
        jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), before, after, state[:2])
    )
    memory = programs.step.memory_analysis()
    assert memory.alias_size_in_bytes >= plan.nbytes(state[:2])
    assert memory.output_size_in_bytes < 1.5 * plan.nbytes(state[:2])  # and no weight
    # Each device has one of two rows and 12 of 48 in the MLP, half of the targets and 66 tokens.
    text, targets = programs.step.as_text(), len(job.batches[0]["at"])
    assert "f32[1,128,12]" in text and "f32[2,128,12]" not in text
    assert f"f32[{targets // 2},66]" in text and f"f32[{targets},66]" not in text


@pytest.mark.parametrize("more", [MESH, ()], ids=["mesh", "one device"])
def test_it_continues_as_on_one_device(
    job: Any, finished: Any, meshed: Any, tmp_path: Path, capsys: Any, more: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(meshed[0], out)
    assert job(out, *more, "--eval-every", "2", "--resume") == 0
    same(finished.out, out, 28)
    report = json.loads((out / "report.json").read_text())
    assert report["restored_max_abs_diff"] == 0 and report["merged_max_abs_diff"] < 1e-3
    names = {path.name for path in finished.out.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    _, base, *_ = begin.load_model(parse([*finished.flags]))
    for a, b in zip(
        *(jax.tree.leaves(checkpoint.restore(x / "adapter", base)) for x in (finished.out, out)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (["fsdp=2,pp=4"], "'pp' is no axis, or there twice; the axes are dp and fsdp"),
        (["tp=2,tp=4"], "'tp' is no axis, or there twice"),
        (["tp=0"], "tp=0 is not a number of devices, as in fsdp=4"),
        (["fsdp"], "fsdp is not a number of devices"),
        (["fsdp=8"], "over 8 devices, which does not divide the 2 of --batch 2: give --batch 8 or"),
        (
            ["dp=2,fsdp=2", "--batch", "8", "--accumulate", "4"],
            "over 4 devices, which does not divide the 2 of --batch 8 over --accumulate 4: "
            "give --batch 16",
        ),
        (["tp=8", "--sweep", "lr=1,2"], "leave --mesh out"),
        (["tp=8", "--distributed", "host:1,2,2"], "host:1,2,2 is not HOST:PORT,COUNT,INDEX"),
        (["tp=8", "--distributed", "--generate", "x"], "--generate is for one process"),
    ],
)
def test_meshes_that_make_no_sense(wrong: list[str], match: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--mesh", *wrong])
    assert match in capsys.readouterr().err


def test_processes_need_a_mesh(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--distributed"])
    assert "--distributed: give --mesh too" in capsys.readouterr().err


@pytest.mark.parametrize("mesh", ["tp=4", "fsdp=2,tp=8"])
def test_a_mesh_has_all_devices(finished: Any, tmp_path: Path, capsys: Any, mesh: str) -> None:
    out = tmp_path / "out"
    assert finetune.main([*finished.flags, "--out", str(out), "--mesh", mesh]) == 2
    error = " ".join(capsys.readouterr().err.split("finetune.py: error: ")[1].split())
    count = {"tp=4": 4}.get(mesh, 16)
    assert f"`--mesh {mesh}`: it has {count} devices, and JAX has 8 (cpu). Give 8 in all" in error
    assert f"set JAX_NUM_CPU_DEVICES={count}" in error and not out.exists()


def test_axes_that_do_not_divide_are_said(capsys: Any) -> None:
    mesh = placing.mesh_of(parse(["--mesh", "fsdp=2,tp=4"]))
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
    kernels = {name: {"kernel": shape(6, 10)} for name in ("q_proj", "o_proj", "k_proj")}
    kernels["k_proj"]["bias"] = shape(8)
    params = placing.place_all(mesh, {"attn": kernels, "norm": {"scale": shape(3)}})
    placing.say_undivided(params)
    assert capsys.readouterr().out.splitlines() == [
        f"--mesh tp=4 does not divide {of}"
        for of in (
            "10: each device has all of this axis of attn/k_proj/kernel and 1 more",
            "6: each device has all of this axis of attn/o_proj/kernel",
        )
    ]
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    assert specs["attn"]["q_proj"]["kernel"] == P("fsdp", None)
    assert specs["attn"]["k_proj"]["bias"] == P("tp") and specs["norm"]["scale"] == P(None)


@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--quantize", "int8", "--scan"], marks=pytest.mark.nightly)],
    ids=["dense", "stored"],
)
def test_a_plan_has_the_bytes_of_a_device(
    sums: Path, tmp_path: Path, capsys: Any, more: list[str]
) -> None:
    model = write_model(tmp_path / "model", TINY | {"num_hidden_layers": 1})
    flags = ["--model", str(model), "--data", str(sums), "--rank", "4", "--length", "16"]
    flags += [*MESH, *more]
    assert finetune.main([*flags, "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 layers on 8 devices, of which the bytes are those of one")
    lines = dict(line.strip().split("  ", 1) for line in said.splitlines()[1:])
    args = parse(flags)
    params = begin.prepare(args).params
    trainable, frozen = jlora.partition(params)
    state = placing.initial(training.make_optimizer(args.lr, args.steps), params)

    def held(tree: Any) -> str:
        """By one device, of real arrays."""
        return plan.size(sum(x.addressable_shards[5].data.nbytes for x in jax.tree.leaves(tree)))

    found = [lines[name].strip() for name in ("base weights", "adapter", "optimizer")]
    assert found == [held(tree) for tree in (frozen, trainable, state)]
    assert found[0] != plan.size(sum(x.nbytes for x in jax.tree.leaves(frozen)))
    assert isinstance(jax.tree.leaves(frozen)[0].sharding, NamedSharding)


@pytest.mark.parametrize("more", [[], [*MESH]], ids=["one device", "mesh"])
def test_a_plan_allocates_nothing(finished: Any, more: list[str]) -> None:
    args = parse([*finished.flags, *more])
    config = begin.configured(args, weights.load_config(args.model))
    given = plan.abstract_step(args, config, 16)[1]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(given))


# ----------------------------------------------------------------------------------------- nightly


OPTIONS = {
    "accumulate": "--accumulate 2",
    "remat": "--remat",
    "scan": "--scan --remat",
    "chunk": "--chunk 100",
    "int8": "--quantize int8",
    "nf4": "--quantize nf4",
    "scan of nf4": "--quantize nf4 --scan --accumulate 2 --chunk 64 --remat",
    "keep": "--quantize keep",
    "scan of keep": "--quantize keep --scan --remat --chunk 64",
    "loftq": "--quantize nf4 --init loftq",
    "pissa": "--init pissa",
    "dora": "--dora --rslora --lora-plus 4",
    "mica": "--form mica",
    "all": "--targets .*_proj/kernel lm_head/kernel embed/embedding",
}
EVERY = [*((mesh, "") for mesh in ("fsdp=8", "fsdp=4,tp=2", "tp=8", "dp=8", "dp=2,fsdp=2,tp=2"))]
EVERY += [("fsdp=4,tp=2", name) for name in OPTIONS] + [("fsdp=2,tp=4", "scan of nf4")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose inputs have blocks of 64; the GGUF file with it has Q4_1 and Q8_0."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_gguf(folder.with_suffix(".gguf"), TINY | sizes)
    return write_model(folder, TINY | sizes)


@pytest.mark.nightly
@pytest.mark.parametrize(("mesh", "name"), EVERY)
def test_as_on_one_device(job: Any, wide: Path, tmp_path: Path, mesh: str, name: str) -> None:
    model = wide.with_suffix(".gguf") if "keep" in name else wide
    flags = ["--model", str(model), "--batch", "8", "--steps", "4", "--lr", "0.005"]
    flags += OPTIONS.get(name, "").split()
    outs = [tmp_path / "one", tmp_path / "mesh"]
    assert job(outs[0], *flags) == 0 and job(outs[1], *flags, "--mesh", mesh) == 0
    arrays = len(load_file(outs[0] / "state" / "4.safetensors"))
    assert arrays % 3 == 2  # the adapter, its moments, and the numbers of the steps
    same(*outs, arrays // 3, 4)


def started(folder: Path, stop: str, devices: int, *flags: str) -> Any:
    """Start a process of the job."""
    path = [Path(job_process.__file__).parents[1] / name for name in ("", "examples", "tests")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    env |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, job_process.__file__, str(folder), *stop.split(), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


@pytest.mark.nightly
def test_killed_on_a_mesh(job: Any, finished: Any, tmp_path: Path) -> None:
    """It continues on the mesh to the same bits, and on one device as if it had begun there."""
    more = ("--eval-every", "2", "--save-every", "1")
    out = tmp_path / "out"
    process = started(out, "SIGKILL 5", 8, *finished.flags, "--out", str(out), *MESH, *more)
    process.communicate(timeout=400)
    assert process.returncode == -signal.SIGKILL and (out / "state" / "3.safetensors").exists()
    shutil.copytree(out, tmp_path / "alone")
    assert job(tmp_path / "alone", *more, "--resume") == 0
    same(finished.out, tmp_path / "alone", 28)
    assert job(out, *MESH, *more, "--resume") == 0 and job(tmp_path / "new", *MESH, *more) == 0
    assert losses(out) == losses(tmp_path / "new")
    ends = [load_file(x / "state" / "6.safetensors") for x in (out, tmp_path / "new")]
    for name, array in ends[0].items():
        np.testing.assert_array_equal(ends[1][name], array)


@pytest.mark.nightly
def test_begun_on_one_device(job: Any, finished: Any, tmp_path: Path) -> None:
    more = ("--eval-every", "2", "--save-every", "1")
    out = tmp_path / "out"
    process = started(out, "SIGKILL 5", 1, *finished.flags, "--out", str(out), *more)
    process.communicate(timeout=400)
    assert process.returncode == -signal.SIGKILL and (out / "state" / "3.safetensors").exists()
    assert job(out, *MESH, *more, "--resume") == 0
    same(finished.out, out, 28)


def two_processes(folder: Path, *flags: str, stop: str = "SIGTERM 0") -> list[Any]:
    """Run the job in two processes with four devices each; the second one is stopped.

    Returns the status of each, what it printed, and what it changed in the folder.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = [
        started(folder, at, 4, *flags, "--distributed", f"localhost:{port},2,{n}")
        for n, at in enumerate(("SIGTERM 0", stop))
    ]
    texts = [process.communicate(timeout=500) for process in found]
    changed = [json.loads(out.splitlines()[-1]) if out else [] for out, _ in texts]
    return [*zip([p.returncode for p in found], texts, changed, strict=True)]


@pytest.mark.nightly
def test_two_processes(job: Any, finished: Any, tmp_path: Path) -> None:
    """One is told to stop, and both do; together they continue, and the first one writes."""
    exports = [f"--export-{kind}={tmp_path}/{{}}/{kind}" for kind in ("peft", "gguf")]
    exports.append(f"--merge={tmp_path}/{{}}/merged")
    flags = ["--batch", "4", "--eval-every", "2"]
    one = [text.format("one") for text in exports]
    assert job(tmp_path / "one", *flags, *one) == 0
    two = [*finished.flags, *flags, "--mesh", "fsdp=4,tp=2", "--out", str(tmp_path / "two")]
    two += [text.format("two") for text in exports]
    first, second = two_processes(tmp_path / "two", *two, stop="SIGTERM 4")
    assert first[0] == second[0] == 0, (first[1], second[1])
    for _, (said, _), _ in (first, second):
        assert "stopped after step 4 of 6" in said
    first, second = two_processes(tmp_path / "two", *two, "--resume")
    assert first[0] == second[0] == 0, (first[1], second[1])
    assert len(first[2]) > 20 and not second[2]
    same(tmp_path / "one", tmp_path / "two", 28)
    files = ["peft/adapter_model.safetensors", "merged/model.safetensors"]
    for name in files:
        a, b = (load_file(tmp_path / x / name) for x in ("one", "two"))
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(b[key], a[key], rtol=0, atol=1e-5)
    sizes = [(tmp_path / x / "gguf").stat().st_size for x in ("one", "two")]
    assert sizes[0] == sizes[1] and (tmp_path / "two" / "peft" / "README.md").exists()
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["restored_max_abs_diff"] == 0 and report["merged_max_abs_diff"] < 1e-3


@pytest.mark.nightly
def test_an_error_in_one_process_ends_both(finished: Any, tmp_path: Path) -> None:
    """The run of another program is at work in the directory, which the first process finds."""
    two = [*finished.flags, "--mesh", "fsdp=2,tp=4", "--out", str(tmp_path / "out")]
    with states.only_run(tmp_path / "out"):
        first, second = two_processes(tmp_path / "out", *two)
    assert first[0] == 2 and "is at work in this" in " ".join(first[1][1].split())
    assert second[0] not in (0, None) and not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_a_plan_for_machines_that_are_not_here(finished: Any, tmp_path: Path) -> None:
    """64 devices, of which each has a fourth of the bytes of 16."""
    sizes = []
    for mesh in ("fsdp=16,tp=4", "fsdp=8,tp=2"):
        flags = [*finished.flags, "--plan", "--batch", "16", "--length", "16", "--mesh", mesh]
        out, errors = started(tmp_path, "SIGTERM 0", 1, *flags).communicate(timeout=400)
        count = 64 if "16" in mesh else 16
        assert f"2 layers on {count} devices" in out, errors
        sizes.append(float(re.findall(r"base weights +([\d.]+)kB", out)[0]))
    rest = (5 * 32 + 14) * 4 / 1000  # norms and scalings, which every device has
    assert (sizes[0] - rest) * 4 == pytest.approx(sizes[1] - rest, abs=0.05)


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")  # Optax's Adam counts in integers
def test_preferences_on_a_mesh(tiny_path: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny_path), "--rank", "4", "--steps", "3", "--length", "96"]
    outs = [tmp_path / "one", tmp_path / "mesh"]
    for out, more in zip(outs, ([], ["--mesh", "fsdp=4,tp=2"]), strict=True):
        assert finetune.main([*flags, "--out", str(out), *more], "", dpo.prepare) == 0
    np.testing.assert_allclose(losses(outs[1]), losses(outs[0]), rtol=1e-5)
