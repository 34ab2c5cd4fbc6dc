"""`steepest train`: one run, with checkpoints to go on from."""

import json as json_module
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from rich.console import Console

from steepest.commands.options import parse_options, settings_from
from steepest.commands.output import print_files, print_tables, result_json
from steepest.errors import InvalidOptionError
from steepest.report.html import write_report
from steepest.report.live import listener_for
from steepest.report.measure import Goals
from steepest.training.checkpoint import Keeping, any_checkpoint, forget, saved_settings
from steepest.training.compare import plan_runs
from steepest.training.errors import CheckpointError
from steepest.training.execute import execute
from steepest.training.files import prepare_folder
from steepest.training.processes import alone_first, check_shares, if_lost, process_group
from steepest.training.records import RecordStore, RunRecord
from steepest.training.select_text import selection_label
from steepest.training.settings import TrainSettings, merge
from steepest.training.spec import RunSpec
from steepest.training.stopping import stop_requested

__all__ = ["train", "train_settings"]

_CHECKPOINTS = "checkpoints"


def train_settings(
    config: Path | None, flags: Mapping[str, object], options: Sequence[str], *, resume: bool
) -> TrainSettings:
    """Settings from a file and flags; to resume, the folder of the run is enough.

    Args:
        config: TOML file, if any.
        flags: What was given on the command line; None says nothing.
        options: `--set` texts.
        resume: Whether a run is to go on.

    Returns:
        The settings; those of the checkpoint if only its folder was named.

    Raises:
        CheckpointError: If a folder was named that has no checkpoint.
    """
    settings = settings_from(TrainSettings, config, flags)
    if resume and settings.task is None and settings.data is None and settings.out is not None:
        folder = Path(settings.out) / _CHECKPOINTS
        if any_checkpoint(folder) is None:
            raise CheckpointError(
                f"there is no checkpoint in {settings.out}: name the folder of an unfinished run, or a task to begin"
            )
        settings = merge(TrainSettings, json_module.loads(saved_settings(folder)), flags)
    return merge(TrainSettings, vars(settings), {"options": parse_options(options, settings.optimizer)})


def train(settings: TrainSettings, *, resume: bool, fresh: bool, json: bool) -> int:
    """Make one run and show how it went.

    Args:
        settings: What to train.
        resume: Go on from the checkpoint, if there is one.
        fresh: Throw away a checkpoint and a record of the same run.
        json: Print JSON instead of a table.

    Returns:
        The exit code: 1 if the run failed or diverged.

    Raises:
        InvalidOptionError: If there is a checkpoint or a record, and nothing says what to do with it.
    """
    if resume and fresh:
        raise InvalidOptionError("--resume goes on and --fresh begins anew: drop one of them")
    (spec,) = plan_runs(settings.request())
    out = Path(settings.out or f"runs/train/{_folder_name(spec)}")
    store = RecordStore(out / "records")
    with process_group(spec.device) as ranks:
        leads = ranks is None or ranks.rank == 0
        errors = Console(stderr=True, markup=False, highlight=False, quiet=not leads)
        record = None if fresh else store.read(spec)
        if record is not None and record.status in {"finished", "diverged"}:
            if not resume:
                raise InvalidOptionError(
                    f"{out} has a record of this run already: --resume shows it, --fresh makes the run again"
                )
            errors.print(f"this run is {record.status} already", soft_wrap=True)
        else:
            check_shares(spec.batch_size, ranks)
            with alone_first(ranks):
                _settle_checkpoint(out / _CHECKPOINTS, resume=resume, fresh=fresh)
                prepare_folder(out)
                store.prepare()
            record = _run(spec, settings, out, store, errors, leads=leads)
    if leads:
        _show(record, out, store.path(spec), json=json)
    return 0 if record.status == "finished" else 1


def _show(record: RunRecord, out: Path, path: Path, *, json: bool) -> None:
    write_report([record], out / "report.html")
    files = {"record": path, "report": out / "report.html"}
    if record.status == "finished":
        files["model"] = out / "model.pt"
    if json:
        typer.echo(result_json([record], Goals(), files))
    else:
        console = Console(markup=False, highlight=False)
        print_tables(console, [record], Goals())
        print_files(console, files)


def _settle_checkpoint(folder: Path, *, resume: bool, fresh: bool) -> None:
    if fresh:
        forget(folder)
        return
    found = any_checkpoint(folder)
    if found is not None and not resume:
        raise InvalidOptionError(
            f"{found} is of a run that is not finished: --resume goes on with it, --fresh begins anew"
        )


def _folder_name(spec: RunSpec) -> str:
    selected = "" if spec.select is None else "-" + re.sub(r"[^\w.=-]+", "-", spec.select).strip("-")
    return f"{spec.task}-{spec.optimizer}{selected}"


def _beginning(checkpoints: Path, spec: RunSpec) -> str:
    on = "" if spec.select is None else f" on {selection_label(spec.select)}"
    what = f"{spec.task} with {spec.optimizer}{on}, seed {spec.seed}"
    found = any_checkpoint(checkpoints)
    return what if found is None else f"{what}: going on from {found}"


def _how_to_go_on(checkpoints: Path, out: Path) -> str:
    found = any_checkpoint(checkpoints)
    if found is None:
        return "there is no checkpoint yet, the same command begins anew"
    return f"the checkpoint {found.name} is there; to go on: torchrun ... -m steepest train --resume --out {out}"


def _run(
    spec: RunSpec, settings: TrainSettings, out: Path, store: RecordStore, errors: Console, *, leads: bool
) -> RunRecord:
    checkpoints = out / _CHECKPOINTS
    errors.print(_beginning(checkpoints, spec), soft_wrap=True)
    with (
        stop_requested() as stop,
        if_lost(lambda: _how_to_go_on(checkpoints, out)),
        listener_for(errors, every_epoch=True) as listener,
    ):
        keeping = Keeping(
            checkpoints=checkpoints,
            model=out / "model.pt",
            settings=settings.to_json(),
            every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
            stop=stop,
            say=lambda text: errors.print(text, soft_wrap=True),
        )
        listener.begin("training", 1)
        listener.run_started(spec, 1, 1)
        try:
            record = execute(spec, lambda point: listener.epoch_done(spec, point), own_process=True, keeping=keeping)
        except KeyboardInterrupt:
            if any_checkpoint(checkpoints) is not None:
                errors.print(f"interrupted; to go on: steepest train --resume --out {out}", soft_wrap=True)
            raise
        if leads:
            store.write(spec, record)
        listener.run_done(spec, record, resumed=False)
    if leads and record.status in {"finished", "diverged"}:
        # The record is there: a checkpoint that stayed behind would only be refused by the next run.
        forget(checkpoints)
    return record
