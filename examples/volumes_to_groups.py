"""From the volumes that `tcurlora predict` measured to a cross-validated classifier of two groups of subjects.

    python examples/volumes_to_groups.py                                     # simulated subjects
    python examples/volumes_to_groups.py maps/volumes.csv subjects.csv --groups CN,AD

volumes.csv has a row for each scan: `case`, and a column ending in " mm3" for each structure. subjects.csv has `case`,
`group`, what is adjusted for (`--adjust`, by default age and sex), and may have `subject`: scans of one subject then
stay in one fold. The first group is the reference: age and sex are regressed out by its subjects in the training folds
alone, and volumes become z-scores of what is left. A logistic regression with L2 penalty classifies them.

It prints the area under the ROC curve and the balanced accuracy on subjects left out, over repeated stratified folds,
beside a classifier that gets age and sex alone, with the p-value of a permutation test, and each structure's
difference between the groups.

What it is not: a diagnosis, or evidence that a difference is due to a disease. Groups that differ in scanner, site or
head size differ in volumes too; give such columns to --adjust. Errors of the segmentation go into the volumes.
Needs scikit-learn and pandas.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

UNIT = " mm3"


class ReferenceScores(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # no types to mypy
    """Volumes as z-scores: what is left of them after a linear model of the covariates, fitted to the reference group.

    Args:
        covariates: How many of the first columns are covariates, which are left out of the result.
    """

    def __init__(self, covariates: int) -> None:
        self.covariates = covariates

    def fit(self, X: np.ndarray, y: np.ndarray) -> ReferenceScores:
        """Fit the model of the covariates to the subjects of group 0."""
        covariates, volumes = np.split(X[y == 0], [self.covariates], axis=1)
        self.model_ = LinearRegression().fit(covariates, volumes)
        # n - 1 - covariates degrees of freedom
        left = volumes - self.model_.predict(covariates)
        self.sd_ = np.sqrt((left**2).sum(0) / max(1, len(left) - 1 - self.covariates))
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """(n, covariates + volumes) -> (n, volumes)."""
        covariates, volumes = np.split(X, [self.covariates], axis=1)
        return (volumes - self.model_.predict(covariates)) / self.sd_


def simulated(subjects: int = 120, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Volumes and subjects of two groups; the second has 12 % less hippocampus, and is two years older on average."""
    rng = np.random.default_rng(seed)
    sick = np.arange(subjects) % 2
    age, sex = rng.normal(70 + 2 * sick, 7), rng.integers(2, size=subjects)
    head = 1 + 0.1 * sex + rng.normal(0, 0.05, subjects)
    hippocampus = 3400 * head * (1 - 0.12 * sick) * (1 - 0.006 * (age - 70)) * (1 + rng.normal(0, 0.09, subjects))
    putamen = 4300 * head * (1 - 0.004 * (age - 70)) * (1 + rng.normal(0, 0.08, subjects))
    names = [f"s{index:03d}" for index in range(subjects)]
    volumes = pd.DataFrame({"case": names, f"hippocampus{UNIT}": hippocampus, f"putamen{UNIT}": putamen})
    groups = np.where(sick == 1, "AD", "CN")
    return volumes, pd.DataFrame({"case": names, "group": groups, "age": age, "sex": np.where(sex == 1, "m", "f")})


def joined(volumes: pd.DataFrame, subjects: pd.DataFrame, groups: list[str], adjust: list[str]) -> pd.DataFrame:
    """One row per scan of the two groups. ValueError where a column is missing or a group has too few scans."""
    for name, table, wanted in (("volumes", volumes, ["case"]), ("subjects", subjects, ["case", "group", *adjust])):
        missing = [column for column in wanted if column not in table]
        if missing:
            raise ValueError(f"{name}: found the columns {', '.join(table)}, expected {', '.join(missing)} too")
        if table["case"].duplicated().any():
            raise ValueError(f"{name}: found {table['case'][table['case'].duplicated()].iloc[0]} twice, expected once")
    if not any(column.endswith(UNIT) for column in volumes):
        raise ValueError(f"volumes: found no column that ends in '{UNIT}', expected one for each structure")
    whole = volumes.astype({"case": str}).merge(subjects.astype({"case": str}), on="case")
    whole = whole[whole["group"].isin(groups)].dropna(subset=adjust)
    for group in groups:
        count = int((whole["group"] == group).sum())
        if count < 10:
            raise ValueError(f"group {group}: found {count} scans with volumes and {', '.join(adjust)}, expected 10")
    return whole


def features(table: pd.DataFrame, adjust: list[str]) -> tuple[np.ndarray, int, list[str]]:
    """Covariates and volumes side by side, how many covariates there are, and the names of the structures."""
    covariates = pd.get_dummies(table[adjust], drop_first=True).astype(float)
    names = [column for column in table if str(column).endswith(UNIT)]
    if (broken := table[names].isna().any()).any():
        raise ValueError(f"volumes: found empty cells in {broken.idxmax()}, expected a number for each scan")
    return np.hstack([covariates, table[names]]), covariates.shape[1], [name.removesuffix(UNIT) for name in names]


Scores = tuple[float, float]  # AUC and balanced accuracy


def score(model: Any, X: np.ndarray, y: np.ndarray, subject: np.ndarray, seed: int) -> Scores:
    """AUC and balanced accuracy of probabilities for subjects that the model was not trained on, in five folds."""
    found = np.zeros(len(y))
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(X, y, subject):
        found[test] = model.fit(X[train], y[train]).predict_proba(X[test])[:, 1]
    return float(roc_auc_score(y, found)), float(balanced_accuracy_score(y, found > 0.5))


def permutation_p(model: Any, X: np.ndarray, y: np.ndarray, subject: np.ndarray, count: int) -> float:
    """The share of permutations of the groups among subjects that reach the AUC of the true groups."""
    _, first, whose = np.unique(subject, return_index=True, return_inverse=True)
    own, rng = score(model, X, y, subject, 0)[0], np.random.default_rng(0)
    others = [score(model, X, rng.permutation(y[first])[whose], subject, 0)[0] for _ in range(count)]
    return (1 + sum(other >= own for other in others)) / (1 + count)


def main() -> None:
    """Read the tables, or simulate them, and print what volumes say of the groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path, nargs="?", help="volumes.csv by tcurlora predict")
    parser.add_argument("subjects", type=Path, nargs="?", help="a row for each scan: case, group, age, sex")
    parser.add_argument("--groups", default="CN,AD", help="the reference group and the other")
    parser.add_argument("--adjust", default="age,sex", help="columns of the subjects' table that are regressed out")
    parser.add_argument("--repeats", type=int, default=10, help="of five folds")
    parser.add_argument("--permutations", type=int, default=200, help="of the permutation test; 0 leaves it out")
    options = parser.parse_args()
    groups, adjust = options.groups.split(","), options.adjust.split(",")
    console = Console()
    try:
        if len(set(groups)) != 2:
            raise ValueError(f"--groups: found {options.groups}, expected two different names, as in CN,AD")
        if options.volumes is None:
            console.print("simulated subjects: the second group has 12 % less hippocampus, and is two years older")
            tables = simulated()
        elif options.subjects is None:
            raise ValueError("found volumes and no table of subjects, expected both")
        else:
            tables = (pd.read_csv(options.volumes), pd.read_csv(options.subjects))
        table = joined(*tables, groups, adjust)
        X, covariates, names = features(table, adjust)
        y = (table["group"] == groups[1]).to_numpy().astype(int)
        subject = table["subject" if "subject" in table else "case"].to_numpy()
        both = set(subject[y == 0]) & set(subject[y == 1])
        if both:
            raise ValueError(f"subjects: found {min(both)} in both groups, expected each subject in one")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    count = {group: int((table["group"] == group).sum()) for group in groups}
    console.print(f"{', '.join(f'{group}: {n} scans' for group, n in count.items())}, {len(set(subject))} subjects")
    shown = Table("features", "AUC", "balanced accuracy, %", "p")
    kinds = {
        " and ".join(adjust): (make_pipeline(StandardScaler(), LogisticRegression()), X[:, :covariates]),
        "volumes, adjusted": (make_pipeline(ReferenceScores(covariates), StandardScaler(), LogisticRegression()), X),
    }
    for name, (model, inputs) in kinds.items():
        found = np.array([score(model, inputs, y, subject, seed) for seed in range(options.repeats)])
        (auc, accuracy), (auc_sd, accuracy_sd) = found.mean(0), found.std(0)
        p = permutation_p(model, inputs, y, subject, options.permutations) if options.permutations else np.nan
        shown.add_row(
            name, f"{auc:.3f} ± {auc_sd:.3f}", f"{100 * accuracy:.1f} ± {100 * accuracy_sd:.1f}",
            f"{p:.3f}" if options.permutations else "",
        )  # fmt: skip
    console.print(shown)
    console.print(f"±: standard deviation over {options.repeats} divisions into five folds, not over other subjects")

    z = ReferenceScores(covariates).fit(X, y).transform(X)
    differences = Table("structure", f"{groups[1]} minus {groups[0]}, SD of {groups[0]}")
    for name, values in zip(names, z.T, strict=True):
        differences.add_row(name, f"{values[y == 1].mean() - values[y == 0].mean():+.2f}")
    console.print(differences)


if __name__ == "__main__":
    main()
