"""The training loop of all experiments: metrics, checkpoints, and exact resumption after any interruption."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.accounting import FlopsCounter
from experiments.agreement import check_copies
from experiments.chips import peak_flops
from experiments.experiment import score
from experiments.machines import Machines, Preempted, PreemptionNotice, Profile, Speed
from experiments.metrics import MetricsLog
from experiments.processes import READING, RESTORING, SAVING, STEPPING, Watch, barrier, from_first
from experiments.variant import TrainState, Variant
from sparsejax import Checkpointer
from sparsejax.analysis import exploration_rate, mask_overlap
from sparsejax.checkpoint import DamagedCheckpointError
from sparsejax.masks.paths import named_leaves


class DivergedError(ValueError):
    """Training has produced what is not a number."""


def train(
    variant: Variant,
    folder: Path,
    seed: int,
    *,
    resume: bool,
    progress: bool = True,
    machines: Machines = Machines(),  # noqa: B008 (frozen)
) -> dict:
    """Trains a variant under one seed; writes `metrics.jsonl` and `checkpoints/` into the run's folder.

    What is done at which step depends on the configuration alone, and the state, the position in the data and the
    metrics are restored together. So a run that is killed, at any point, and resumed ends with the same bits as one
    that is not. Only a stop on notice of preemption adds records, of kinds `train` and `masks` at its step: they and
    the next ones are two parts of what else is one. It may be resumed on another mesh and with another number of
    processes: it starts from the same bits, and from there on sums are added in another order.

    Args:
        variant: what to train.
        folder: the run's folder; all processes must see the same one.
        seed: of the weights, the order of the data and the masks.
        resume: continue from the newest checkpoint, if there is one; of damaged ones it is said that they are.
        progress: show a progress bar.
        machines: what is watched; its mesh is the variant's.

    Returns:
        The closing record.

    Raises:
        Preempted: notice came that the machine will be taken away; the state has been saved.
        DivergedError: a loss or a weight is not finite; nothing of it has been saved.
        DisagreementError: devices that must hold the same values do not.
        DamagedCheckpointError: no checkpoint can be read.
    """
    config = variant.config
    data = iter(variant.task.batches(seed))
    checkpoints = Checkpointer(folder / "checkpoints", keep=config.keep_checkpoints)
    with checkpoints, Watch(machines.patience) as watch, PreemptionNotice() as preempted:
        newest = from_first(lambda: checkpoints.latest_step, machines.patience) if resume else None
        if newest is not None:
            watch.doing(RESTORING, newest)
            saved = _restore_newest(checkpoints, {"train": variant.abstract_state(), "training_flops": 0}, machines)
        else:
            saved = {"train": variant.first_state(seed), "training_flops": 0}
        state = saved["train"]
        step = int(state.step)
        watch.doing(READING, step)
        # Batches are a function of seed and step, so the step is the position, whatever the number of processes.
        data.set_state({**data.get_state(), "next_index": step})
        _compare(variant, state)
        flops = FlopsCounter(
            variant.forward, variant.sizes, variant.algorithm(), config.batch_size, saved["training_flops"]
        )
        log = MetricsLog(folder / "metrics.jsonl", after=None if newest is None else step, writes=machines.first)
        last = log.last("train")
        started = time.monotonic() - (last["seconds"] if step and last else 0.0)
        before = _copy(variant.masks(state))
        bar = tqdm(
            total=config.steps,
            initial=step,
            desc=f"{variant.name:>10} seed {seed}",
            disable=not progress,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # in files and pipes every state of it is a line
        )
        speed = Speed(config.batch_size)
        profile = Profile(machines.profile if machines.first else "", config.steps - step)
        with log, bar, profile:
            if newest is None:
                _log_masks(log, variant, state, step, before)
                _log_quality(log, variant, state, step)
            for end in _stops(config, step):
                first, seen, stopping = step, [], False
                with speed.over(end - first):
                    while step < end and not stopping:
                        watch.doing(READING, step)
                        batch = next(data)
                        watch.doing(STEPPING, step)
                        profile.step(state)
                        state, loss_and_kept = variant.run_step(state, variant.place(batch), np.uint32(seed))
                        seen.append(loss_and_kept)
                        step += 1
                        stopping = preempted(step)
                        if machines.compare_every and step % machines.compare_every == 0:
                            _compare(variant, state)
                        bar.update()
                    losses, kept = map(np.stack, zip(*jax.device_get(seen), strict=True))
                _check_losses(losses, first, checkpoints)
                flops.add(first, kept, variant.trainable(state))
                log.write("train", step, loss=float(losses.mean()), seconds=round(time.monotonic() - started, 3))
                _log_speed(log, variant, flops, speed, step)
                _log_masks(log, variant, state, step, before)
                before = _copy(variant.masks(state))
                if step == end and _due(step, config.eval_every, config):
                    bar.set_postfix_str(_in_words(_log_quality(log, variant, state, step)), refresh=False)
                if stopping or _due(step, config.save_every, config):
                    watch.doing(SAVING, step)
                    _check_weights(state, step, checkpoints)
                    checkpoints.save(step, {"train": state, "training_flops": flops.total}, overwrite=True)
                if stopping:
                    checkpoints.wait()
                    raise Preempted(f"notice of preemption: saved step {step} of {config.steps}")
            checkpoints.wait()  # what is finished is on disk
            _compare(variant, state)
            final = _log_final(log, variant, state, flops, round(time.monotonic() - started, 3))
            barrier("the end of a run", machines.patience)
            return final


def _restore_newest(checkpoints: Checkpointer, like: dict, machines: Machines) -> dict:
    try:
        return checkpoints.restore(like)
    except DamagedCheckpointError as error:
        if error.good_step is None:
            raise
        if machines.first:
            print(f"warning: {error}; resuming from there", file=sys.stderr)
        return checkpoints.restore(like, step=error.good_step)


def _compare(variant: Variant, state: TrainState) -> None:
    if variant.layout is not None:
        check_copies(state, variant.layout.mesh)


def _check_losses(losses: np.ndarray, first: int, checkpoints: Checkpointer) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise DivergedError(_diverged(f"the loss of step {first + int(bad[0])} is {losses[bad[0]]}", checkpoints))


def _check_weights(state: TrainState, step: int, checkpoints: Checkpointer) -> None:
    """Keeps a network that has diverged from taking the place of one that has not."""
    finite = jax.device_get(_finite(state.params))
    bad = [name for name, fine in named_leaves(finite) if not fine]
    if bad:
        raise DivergedError(_diverged(f"after {step} steps {bad[0]} has entries that are not finite", checkpoints))


@jax.jit
def _finite(tree):
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)


def _diverged(what: str, checkpoints: Checkpointer) -> str:
    newest = checkpoints.latest_step
    kept = "nothing was saved before" if newest is None else f"the newest checkpoint, of step {newest}, is as it was"
    return f"{what}; {kept}. Lower the learning rate, clip gradients, or leave out the batch, and start again"


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


def _log_speed(log: MetricsLog, variant: Variant, flops: FlopsCounter, speed: Speed, step: int) -> None:
    devices = jax.devices()[:1] if variant.layout is None else variant.layout.mesh.devices.flat
    record = speed.record(flops.dense(1), flops.total, step, peak_flops(devices))
    if record:
        log.write("speed", step, **record)


def _log_final(log: MetricsLog, variant: Variant, state: TrainState, flops: FlopsCounter, seconds: float) -> dict:
    quality = log.last("eval") or {}  # where another process writes, there may be none
    kept = np.asarray(variant.kept(state)).tolist()
    size = sum(variant.sizes.values())
    return log.write(
        "final",
        variant.config.steps,
        **{name: quality.get(name) for name in ("loss", variant.task.metric)},
        nnz=sum(kept),
        size=size,
        sparsity=1 - sum(kept) / size,
        training_flops=flops.total,
        dense_training_flops=flops.dense(variant.config.steps),
        inference_flops=flops.inference(kept),
        dense_inference_flops=variant.forward.total,
        execution="accelerated" if variant.stored else "simulated" if variant.sparse else "dense",
        seconds=seconds,
    )


def _in_words(quality: dict[str, float]) -> str:
    if "accuracy" in quality:
        return f"accuracy {100 * quality['accuracy']:.1f} %"
    return f"{quality['bits_per_byte']:.3f} bits per byte"
