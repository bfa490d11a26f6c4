"""Contact sheets and plots."""

from .plots import plot_schedules
from .plots_transport import plot_couplings, plot_paths, plot_plan
from .sheets import labelled_grid, to_pictures

__all__ = ["labelled_grid", "plot_couplings", "plot_paths", "plot_plan", "plot_schedules", "to_pictures"]
