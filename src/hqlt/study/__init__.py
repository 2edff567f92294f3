"""Studies: models, tasks, budgets and seeds in one YAML file, run as a grid of cells, reported as table and plots."""

from hqlt.study.study import Experiment, Study, known_studies, read_study

__all__ = ["Experiment", "Study", "known_studies", "read_study"]
