"""Studies: models, tasks, budgets and seeds in a YAML file, run as a grid of cells and reported as table and plots."""

from hqlt.study.study import Experiment, Study, known_studies, read_study

__all__ = ["Experiment", "Study", "known_studies", "read_study"]
