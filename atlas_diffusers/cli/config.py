"""The subcommands ``config``, ``profiles`` and ``check-hardware``."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  atlas-diffusers config validate training/recipes/emoji.yaml
  atlas-diffusers config validate system.yaml --kind system
  atlas-diffusers config presets
  atlas-diffusers config reference > docs/configuration.md
"""
KINDS = ("recipe", "system", "bridge", "kernel", "model", "sampler")


def add_config_commands(commands: argparse._SubParsersAction) -> None:
    """Add ``config``, ``profiles`` and ``check-hardware`` to the subcommands of a parser."""
    config = commands.add_parser(
        "config", help="check and list configurations", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = config.add_subparsers(dest="action", required=True)
    check = actions.add_parser("validate", help="report every mistake of a file")
    check.add_argument("file", type=Path)
    check.add_argument("--kind", choices=KINDS, default="recipe", help="default: %(default)s")
    check.set_defaults(run=run_validate)
    actions.add_parser("presets", help="list presets").set_defaults(run=run_presets)
    actions.add_parser("reference", help="every field, as Markdown").set_defaults(run=run_reference)
    commands.add_parser("profiles", help="list GPU profiles").set_defaults(run=run_profiles)
    hardware = commands.add_parser("check-hardware", help="which profile fits this machine")
    hardware.add_argument("--json", action="store_true", help="machine-readable")
    hardware.set_defaults(run=run_check_hardware)


def run_validate(args: argparse.Namespace) -> None:
    from .. import config

    if args.kind == "system":
        from ..system import AdvancedDiffusionSystem

        AdvancedDiffusionSystem(args.file)
    else:
        models = {
            "recipe": config.TrainingConfig, "bridge": config.BridgeConfig, "kernel": config.KernelConfig,
            "model": config.HighResModelConfig, "sampler": config.SamplerConfig,
        }  # fmt: skip
        found = config.validate(models[args.kind], config.read_mapping(args.file))
        if args.kind == "recipe":
            from ..training.networks import check_recipe

            check_recipe(found)
    print(f"{args.file}: valid")


def run_presets(args: argparse.Namespace) -> None:
    from ..config import list_presets

    print("\n".join(list_presets()))


def run_reference(args: argparse.Namespace) -> None:
    from ..config.reference import reference

    print(reference(), end="")


def run_profiles(args: argparse.Namespace) -> None:
    from ..hardware import find_profile, profile_names

    print(f"{'profile':8} {'pictures':>8} {'pixels':>7} {'dtype':9} GPUs")
    for name in profile_names():
        profile = find_profile(name)
        print(f"{name:8} {profile.batch_size:8} {profile.resolution:7} {profile.dtype:9} {profile.description}")


def run_check_hardware(args: argparse.Namespace) -> None:
    from ..check_hardware import main

    main(["--json"] if args.json else [])
