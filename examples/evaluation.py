"""Evaluation before and after training: held-out loss, generated text, phoneme error rate."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import data
import jax
import llama
import numpy as np
import placing
import training
from tokenizers import Tokenizer
from tqdm import tqdm

import jlora

SHOWN, GROUP = 8, 64  # samples shown, prompts decoded at once

Apply = Callable[..., Any]


class Job(NamedTuple):
    """Everything that a run needs."""

    config: llama.Config
    params: Any  # with the adapter attached
    tokenizer: Tokenizer
    stop: int
    dataset: data.Dataset
    batches: list[training.Batch]
    held_out: list[training.Batch]
    prompts: list[data.Example]
    accumulate: int = 1  # the parts of a training batch
    loss: Callable[[Apply], Any] | None = None  # of the adapted model, if not `training.make_loss`
    measures: Callable[[Apply], Any] | None = None  # what else is measured on held-out batches


def make_apply(config: llama.Config) -> Apply:
    """The plain model as a function of its params; jlora.lora adapts it."""
    model = llama.Llama(config)
    return lambda params, *args: model.apply({"params": params}, *args)


class Programs(NamedTuple):
    """The compiled functions."""

    step: Callable[..., Any]
    loss: Callable[..., jax.Array]
    generate: Callable[..., jax.Array]
    measure: Callable[..., dict[str, jax.Array]] | None = None


def compile_all(
    job: Job, tx: Any, state: training.State, frozen: Any, apply: Apply | None = None
) -> Programs:
    """Compile training step, held-out loss and generation ahead of time, behind a progress bar.

    `apply` is the adapted model, if it is more than `jlora.lora` of the plain one.
    """
    apply = apply or jlora.lora(make_apply(job.config))
    loss = training.make_loss(apply, chunked=job.config.chunk > 0)
    loss = placing.split(loss if job.loss is None else job.loss(apply), job.config)
    step = training.make_step(loss, tx, job.accumulate)
    longest = max(len(e.tokens) - e.start for e in job.dataset.held_out)
    answer = functools.partial(
        llama.generate, apply, job.config, steps=min(64, longest + 4), stop=job.stop
    )
    tokens, segments = data.pad_prompts(job.prompts)
    group = min(GROUP, len(tokens))
    given = (state.trainable, state.opt_state, frozen, job.batches[0])
    work = [
        lambda: placing.lower(step, *given, kept=2),
        lambda: placing.lower(loss, job.params, job.held_out[0]),
        lambda: placing.lower(answer, job.params, tokens[:group], segments[:group]),
    ]
    if job.measures is not None:
        measure = placing.split(job.measures(apply), job.config)
        work.append(lambda: placing.lower(measure, job.params, job.held_out[0]))
    return Programs(*(lower().compile() for lower in tqdm(work, desc="compile", unit="program")))


def evaluate(
    job: Job, programs: Programs, params: Any, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """The held-out loss, the generated text and, for CMUdict, the phoneme error rate.

    None if `stopped()` became true meanwhile.
    """
    tokens, segments = data.pad_prompts(job.prompts)
    group = min(GROUP, len(tokens))
    short = -len(tokens) % group  # pad the last group, so that one program serves all groups
    tokens, segments = (np.pad(a, ((0, short), (0, 0)), mode="edge") for a in (tokens, segments))
    total = weight = 0.0
    measured: list[dict[str, jax.Array]] = []
    said: list[str] = []
    count = len(job.held_out) + len(tokens) // group
    with tqdm(total=count, desc="evaluate", leave=False) as bar:
        for batch in job.held_out:
            if stopped():
                return None
            # A mean over targets or, where something else is measured, over as many pairs.
            size = batch["weight"].sum() if programs.measure is None else 1.0
            total += float(programs.loss(params, batch)) * size
            weight += size
            if programs.measure is not None:
                measured.append(programs.measure(params, batch))
            bar.update()
        for i in range(0, len(tokens), group):
            if stopped():
                return None
            ids = programs.generate(params, tokens[i : i + group], segments[i : i + group])
            said += job.tokenizer.decode_batch(np.asarray(ids).tolist())
            bar.update()
    said = said[: len(job.prompts)]
    truth = [example.completion for example in job.prompts]
    rate = data.phoneme_error_rate(truth, said) if job.dataset.phonemes else None
    means = {name: float(np.mean([m[name] for m in measured])) for name in (measured or [{}])[0]}
    return {"loss": float(total / weight), "rate": rate, "said": said[:SHOWN]} | (
        {"measured": means} if means else {}
    )


def show(job: Job, score: dict[str, Any]) -> None:
    """Print an evaluation."""
    rate = "" if score["rate"] is None else f", phoneme error rate {score['rate']:.3f}"
    rate += "".join(f", {k} {v:.3f}" for k, v in score.get("measured", {}).items())
    lines = [f"\nstep {score['step']}: held-out loss {score['loss']:.3f}{rate}"]
    for example, said in zip(job.prompts, score["said"], strict=False):
        lines.append(f"  {example.prompt}{(said.splitlines() or [''])[0]}")
        lines.append(f"  {'(should be)':>{len(example.prompt)}}{example.completion}")
    tqdm.write("\n".join(lines))
