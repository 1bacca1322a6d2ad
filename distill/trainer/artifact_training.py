"""Training of one artifact: whether it is missing, writing it complete, resuming its training."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.data.tokens import CHATS
from distill.models.packing import check_packing
from distill.trainer.checkpoint import Curve
from distill.trainer.evaluate import Validation
from distill.trainer.logging import open_trackers
from distill.trainer.loop import Step, accelerator, train
from eval.core.artifacts import Key, build_artifact, is_done
from eval.core.config import flat_settings
from eval.core.documents import Row, pad_id
from eval.core.jobs import Progress
from eval.core.sections import Train
from eval.core.study import Study

MONITORING_ONLY = {"checkpoint_every", "evaluate_every"}  # settings of `train` without effect on weights


def is_missing(study: Study, name: str, key: Key) -> bool:
    """True if the artifact `name` must be made; every process of a launch answers before any goes on."""
    missing = not is_done(study.folder / name, key, study.accept_old)
    accelerator().wait_for_everyone()
    return missing


@contextmanager
def build_shared(study: Study, name: str, **manifest: Any) -> Iterator[Path]:
    """A folder that becomes the artifact `name`; what other processes than the first write is discarded."""
    acc = accelerator()
    if acc.is_main_process:
        with build_artifact(study.folder / name, name=name, **manifest) as folder:
            yield folder
    else:
        with TemporaryDirectory() as discarded:
            yield Path(discarded)
    acc.wait_for_everyone()


def rows_shape(study: Study) -> list[Any]:
    """The settings that decide the training rows, beside data and tokenizer."""
    data = study.data
    beside = [data.loss_on, data.end_of_text]
    beside = [] if beside == ["last", False] else beside
    chats = any(source.messages_column for source in data.sources)
    return [data.context, data.train_rows, data.packing, *beside, *([CHATS] if chats else [])]


def scratch_folder(study: Study, name: str, key: Key) -> Path:
    """Folder for unfinished work on the artifact `name`, another one for each key."""
    return study.folder / "scratch" / name.replace("/", "-") / key.digest[:16]


def run_training(
    study: Study,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: Train,
    *,
    key: Key,
    **options: Any,
) -> Curve:
    """Trains with resumable checkpoints in the scratch folder of `name`, and with logs.

    Args:
        options: further arguments of `loop.train`.
    """
    pad, scratch = pad_id(tokenizer), scratch_folder(study, name, key)
    if study.data.packing:
        check_packing(model, rows, pad)
    if config.evaluate_every and study.trackers:
        data, context = study.folder / "data", study.data.context
        options["evaluate"] = Validation(data, tokenizer, context, pad, accelerator())
    run, fresh = name.removeprefix("students/").replace("/", "-"), not scratch.exists()
    about: dict[str, Any] = {"project": study.name, "config": flat_settings(study.model_dump(mode="json"))}
    with open_trackers(accelerator(), study.trackers, study.folder / "logs", run, fresh, **about) as log:
        return train(model, rows, config, pad=pad, scratch=scratch, log=log, **options)


def delete_scratch(study: Study, name: str) -> None:
    """Deletes the checkpoints of a finished artifact and of its parts."""
    if accelerator().is_main_process:
        top, stem = study.folder / "scratch", name.replace("/", "-")
        for folder in [top / stem, *top.glob(f"{stem}-*")]:
            shutil.rmtree(folder, ignore_errors=True)


def step_progress(report: Progress, share: float = 1.0) -> Callable[[Step], None]:
    """A callback for steps that reports the progress of a job of which training is a `share`."""
    return lambda step: report(share * step.number / step.total, step.tokens)
