"""The subcommand ``atlas-diffusers compare``: noise schedulers and samplers side by side."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  atlas-diffusers compare -o comparison.png
  atlas-diffusers compare --config system.yaml --steps 10 --shape 1 3 64 64 -o comparison.png
"""


def add_compare_command(commands: argparse._SubParsersAction) -> None:
    """Add ``compare`` to the subcommands of a parser."""
    compare = commands.add_parser(
        "compare",
        help="samples of several schedulers from the same noise",
        description="Sample with every pipeline of a configuration from the same noise, under the exact prediction for "
        "Gaussian data, and lay the first samples out with time, network calls and distance to the first pipeline's.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("--config", type=Path, help="YAML or JSON of pipelines (default: every sampler, linear betas)")
    compare.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    compare.add_argument("--shape", type=int, nargs=4, default=[1, 3, 32, 32], metavar="N", help="default: 1 3 32 32")
    compare.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    compare.add_argument("-o", "--output", type=Path, default=Path("comparison.png"), help="default: %(default)s")
    compare.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> None:
    from ..pictures.plots import check_path

    check_path(args.output)
    from ..system import AdvancedDiffusionSystem, NoiseSchedulerConfig, SamplingMethod

    system = AdvancedDiffusionSystem(args.config)
    if args.config is None:
        for method in SamplingMethod:
            system.create_pipeline(method.value, NoiseSchedulerConfig(timestep_spacing="trailing"), method)
    found = system.compare_schedulers(tuple(args.shape), args.steps, seed=args.seed)
    found.plot(args.output)
    for name in found:
        print(f"{name}: {found.network_calls[name]} calls, {found.seconds[name]:.3f} s, distance {found.distances[name]:.4f}")
    print(args.output.resolve())
