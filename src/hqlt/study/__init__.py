"""Studies: models, tasks, budgets and seeds in a YAML file, run as a grid of cells and reported as table and plots."""

from hqlt.study.read import known_studies, read_study
from hqlt.study.study import Experiment, Study

__all__ = ["Experiment", "Study", "known_studies", "read_study"]
