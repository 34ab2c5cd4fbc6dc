"""Regression tables that the machine learning literature reports on, as files of the user's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from steepest.training.errors import DataError
from steepest.training.readers.files import find_files
from steepest.training.tabular import table_task
from steepest.training.task import FileTask, Task
from steepest.training.tuned import rates, tuned_rates

_UCI = "the UCI Machine Learning Repository (https://archive.ics.uci.edu)"


def _entry(
    name: str,
    title: str,
    columns: Sequence[str],
    *,
    rows: int,
    files: tuple[str, ...],
    origin: str,
    options: Mapping[str, Mapping[str, object]],
) -> FileTask:
    features = len(columns) - 1
    description = f"{title}: {rows:,} rows, {features} inputs; MLP {features}-64-64-1"

    def at(folder: Path) -> Task:
        path = find_files(folder, name, [files], origin)[0]
        if path.stem == "data" and path.parent.name != name:
            raise DataError(f"{path} may be of any data set: put it into a folder {name} inside the data folder")
        task = table_task(
            path,
            target=columns[-1],
            kind="regression",
            name=name,
            description=description,
            columns=tuple(columns),
        )
        task = replace(task, options=options, options_source=tuned_rates(7))
        splits = task.load(0)
        found = sum(map(len, (splits.train, splits.val, splits.test)))
        if found == rows:
            return task
        other = f"{path} has {found:,} rows, the published data {rows:,}: results cannot be compared with others"
        return replace(task, description=f"{title}: {found:,} rows, {features} inputs", notes=(*task.notes, other))

    return FileTask(name, description, "regression", f"{name}/{files[0]}", origin, at)


ENTRIES = [
    _entry(
        "california_housing",
        "median house value of Californian districts in 1990",
        (
            "longitude",
            "latitude",
            "housing_median_age",
            "total_rooms",
            "total_bedrooms",
            "population",
            "households",
            "median_income",
            "median_house_value",
        ),
        rows=20_640,
        files=("cal_housing.data", "cal_housing.csv", "california_housing.csv"),
        origin="StatLib or Luis Torgo's regression data sets (cal_housing.data, comma-separated, nine columns)",
        options=rates(sven=1.0, sgd=0.1, adam=0.03, lbfgs=0.01),
    ),
    _entry(
        "concrete",
        "compressive strength of concrete",
        (
            "cement",
            "blast_furnace_slag",
            "fly_ash",
            "water",
            "superplasticizer",
            "coarse_aggregate",
            "fine_aggregate",
            "age",
            "compressive_strength",
        ),
        rows=1_030,
        files=("data.txt", "concrete.csv"),
        origin=f"{_UCI}, Concrete Compressive Strength, saved as text",
        options=rates(sven=1.0, sgd=0.1, adam=0.03, lbfgs=0.316),
    ),
    _entry(
        "energy",
        "heating load of buildings",
        (
            "relative_compactness",
            "surface_area",
            "wall_area",
            "roof_area",
            "overall_height",
            "orientation",
            "glazing_area",
            "glazing_area_distribution",
            "heating_load",
        ),
        rows=768,
        files=("data.txt", "energy.csv"),
        origin=f"{_UCI}, Energy Efficiency, saved as text without the cooling load",
        options=rates(sven=1.0, sgd=0.1, adam=0.03, lbfgs=1.0),
    ),
    _entry(
        "power_plant",
        "electrical output of a combined cycle power plant",
        ("temperature", "exhaust_vacuum", "ambient_pressure", "relative_humidity", "electrical_output"),
        rows=9_568,
        files=("data.txt", "power_plant.csv"),
        origin=f"{_UCI}, Combined Cycle Power Plant, saved as text",
        options=rates(sven=1.0, sgd=0.1, adam=0.0949, lbfgs=0.01),
    ),
    _entry(
        "airfoil",
        "sound pressure of an airfoil in a wind tunnel",
        (
            "frequency",
            "angle_of_attack",
            "chord_length",
            "free_stream_velocity",
            "displacement_thickness",
            "sound_pressure",
        ),
        rows=1_503,
        files=("airfoil_self_noise.dat", "airfoil.csv"),
        origin=f"{_UCI}, Airfoil Self-Noise",
        options=rates(sven=1.0, sgd=0.1, adam=0.03, lbfgs=0.1),
    ),
]
