"""The training loop of all experiments: metrics, checkpoints, and exact resumption after any interruption."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.accounting import FlopsCounter
from experiments.experiment import score
from experiments.metrics import MetricsLog
from experiments.variant import TrainState, Variant
from sparsejax import Checkpointer
from sparsejax.analysis import exploration_rate, mask_overlap
from sparsejax.checkpoint import DamagedCheckpointError


def train(variant: Variant, folder: Path, seed: int, *, resume: bool, progress: bool = True) -> dict:
    """Trains a variant under one seed; writes `metrics.jsonl` and `checkpoints/` into the run's folder.

    What is done at which step depends on the configuration alone, and the state, the position in the data and the
    metrics are restored together. So a run that is killed, at any point, and resumed ends with the same bits as one
    that is not.

    Args:
        variant: what to train.
        folder: the run's folder.
        seed: of the weights, the order of the data and the masks.
        resume: continue from the newest checkpoint, if there is one; of damaged ones it is said that they are.
        progress: show a progress bar.

    Returns:
        The closing record.
    """
    config = variant.config
    data = iter(variant.task.batches(seed))
    with Checkpointer(folder / "checkpoints", keep=config.keep_checkpoints) as checkpoints:
        saved = {"train": variant.first_state(seed), "training_flops": 0}
        resumed = resume and checkpoints.latest_step is not None
        if resumed:
            saved = _restore_newest(checkpoints, saved, data)
        state = saved["train"]
        step = int(state.step)
        flops = FlopsCounter(
            variant.forward, variant.sizes, variant.algorithm(), config.batch_size, saved["training_flops"]
        )
        log = MetricsLog(folder / "metrics.jsonl", after=step if resumed else None)
        started = time.monotonic() - (log.last("train")["seconds"] if step else 0.0)
        before = _copy(variant.masks(state))
        bar = tqdm(total=config.steps, initial=step, desc=f"{variant.name:>10} seed {seed}", disable=not progress)
        with log, bar:
            if not resumed:
                _log_masks(log, variant, state, step, before)
                _log_quality(log, variant, state, step)
            for end in _stops(config, step):
                seen = []
                for batch in itertools.islice(data, end - step):
                    state, loss_and_kept = variant.run_step(state, batch, jnp.uint32(seed))
                    seen.append(loss_and_kept)
                    bar.update()
                losses, kept = map(np.stack, zip(*jax.device_get(seen), strict=True))
                flops.add(step, kept, variant.trainable(state))
                step = end
                log.write("train", step, loss=float(losses.mean()), seconds=round(time.monotonic() - started, 3))
                _log_masks(log, variant, state, step, before)
                before = _copy(variant.masks(state))
                if _due(step, config.eval_every, config):
                    bar.set_postfix_str(_in_words(_log_quality(log, variant, state, step)))
                if _due(step, config.save_every, config):
                    saved = {"train": state, "training_flops": flops.total}
                    checkpoints.save(step, saved, data, overwrite=True)
            checkpoints.wait()  # what is finished is on disk
            return _log_final(log, variant, state, flops, round(time.monotonic() - started, 3))


def _restore_newest(checkpoints: Checkpointer, like: dict, data) -> dict:
    try:
        return checkpoints.restore(like, data)
    except DamagedCheckpointError as error:
        if error.good_step is None:
            raise
        print(f"warning: {error}; resuming from there", file=sys.stderr)
        return checkpoints.restore(like, data, step=error.good_step)


def _stops(config, step: int) -> Iterator[int]:
    """The steps after `step` at which something is written, wherever a run was interrupted."""
    while step < config.steps:
        nexts = [(step // every + 1) * every for every in (config.log_every, config.eval_every, config.save_every)]
        step = min(*nexts, config.steps)
        yield step


def _due(step: int, every: int, config) -> bool:
    return step % every == 0 or step == config.steps


def _copy(masks):
    """Masks that outlive the state, whose buffers the next steps take over."""
    return jax.tree.map(jnp.copy, masks)


def _log_masks(log: MetricsLog, variant: Variant, state: TrainState, step: int, before) -> None:
    overlap = mask_overlap(before, variant.masks(state))
    layers = {
        path: {"nnz": change.nnz, "size": change.size, "added": change.added, "dropped": change.dropped}
        for path, change in overlap.layers.items()
    }
    total = overlap.total
    explored = exploration_rate(state.explored)
    log.write("masks", step, nnz=total.nnz, size=total.size, layers=layers, exploration=explored)


def _log_quality(log: MetricsLog, variant: Variant, state: TrainState, step: int) -> dict[str, float]:
    quality = score(variant.task.metric, jax.device_get(variant.evaluate(state)))
    log.write("eval", step, **quality)
    return quality


def _log_final(log: MetricsLog, variant: Variant, state: TrainState, flops: FlopsCounter, seconds: float) -> dict:
    quality = log.last("eval")
    kept = np.asarray(variant.kept(state)).tolist()
    size = sum(variant.sizes.values())
    return log.write(
        "final",
        variant.config.steps,
        **{name: quality[name] for name in ("loss", variant.task.metric)},
        nnz=sum(kept),
        size=size,
        sparsity=1 - sum(kept) / size,
        training_flops=flops.total,
        dense_training_flops=flops.dense(variant.config.steps),
        inference_flops=flops.inference(kept),
        dense_inference_flops=variant.forward.total,
        execution="simulated" if variant.sparse else "dense",
        seconds=seconds,
    )


def _in_words(quality: dict[str, float]) -> str:
    if "accuracy" in quality:
        return f"accuracy {100 * quality['accuracy']:.1f} %"
    return f"{quality['bits_per_byte']:.3f} bits per byte"
