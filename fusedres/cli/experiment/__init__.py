"""``fusedres experiment``: the paper's experiments (He et al. 2015), at the size that a machine allows."""

from __future__ import annotations

import argparse

from fusedres.cli.experiment import comparison, localization, responses
from fusedres.cli.options import Commands, add_command

EXPERIMENTS = (*comparison.EXPERIMENTS, responses.EXPERIMENT, localization.EXPERIMENT)


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "experiment",
        help="run an experiment of the paper",
        description="Run an experiment of He et al. 2015 and print the paper's figures beside it.",
        example="fusedres experiment degradation --data cifar10/ --budget 60 --out degradation",
    )
    experiments = parser.add_subparsers(metavar="EXPERIMENT", required=True)
    for experiment in EXPERIMENTS:
        experiment.add_parser(experiments).set_defaults(experiment=experiment.run)
    return parser


def run(args: argparse.Namespace) -> int:
    return int(args.experiment(args))
