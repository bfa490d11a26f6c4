"""Which profile fits this machine: python -m atlas_diffusers.check_hardware [--json]"""

import argparse
import json
import sys

from .hardware import describe


def main(argv: list[str] | None = None) -> int:
    """Print what :func:`~atlas_diffusers.hardware.describe` finds, as text or JSON."""
    parser = argparse.ArgumentParser(prog="python -m atlas_diffusers.check_hardware", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(argv)
    found = describe()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in found["gpus"]) or "none"
    print(f"Python {found['python']}, torch {found['torch']}, {found['cpu_threads']} CPU threads")
    print(f"CUDA GPUs: {gpus}; Apple MPS: {'yes' if found['mps'] else 'no'}")
    print(f"profile {found['profile']}: " + ", ".join(f"{k}={v}" for k, v in found["settings"].items() if k != "description"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
