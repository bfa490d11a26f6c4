"""Calibration: better than the plain solver on trajectories it has not seen, at a stated cost, and resumable."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline, seeded
from oracles import Gaussian
from scipy.optimize import minimize

from atlas_diffusers import AtlasMultistepScheduler, AtlasPipeline
from atlas_diffusers.schedulers.adams_bashforth import adams_bashforth
from atlas_diffusers.schedulers.calibration import fit as fit_module
from atlas_diffusers.schedulers.calibration.calibrator import Calibrator
from atlas_diffusers.schedulers.calibration.fit import Fit, follow, least_squares, ridge_solution
from atlas_diffusers.schedulers.calibration.model import FunctionModel
from atlas_diffusers.schedulers.calibration.node_placement import Placement
from atlas_diffusers.schedulers.calibration.refine import DIFFERENCE, affordable, derivatives, refine
from atlas_diffusers.schedulers.calibration.tables import StepTable
from atlas_diffusers.schedulers.calibration.teacher import Trajectories, run_teacher, teacher_sigmas, teacher_steps_that_suffice

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OPTIONS = {"config": CONFIG, "progress": False}
CENTRES = torch.tensor([[1.5, 0.0, 0.5], [-1.0, 1.0, 0.0], [-0.5, -1.5, -0.5]], dtype=torch.float64)
STD = 0.2


class Mixture:
    """ε of three Gaussians in three dimensions, at the level that a timestep has in the middle of its table."""

    def __init__(self, fails_after=None):
        self.scheduler, self.calls, self.fails_after = AtlasMultistepScheduler(**CONFIG), 0, fails_after

    def data(self, x, alpha, sigma):
        variance = alpha**2 * STD**2 + sigma**2
        mean = (-torch.cdist(x, alpha * CENTRES).square() / (2 * variance)).softmax(1) @ CENTRES
        return mean + alpha * STD**2 / variance * (x - alpha * mean)

    def __call__(self, x, t):
        self.calls += len(x)
        if self.fails_after is not None and self.calls > self.fails_after:
            raise KeyboardInterrupt
        sigma_hat = self.scheduler.process.finite.sigma_hat_at(t.double(), log=True).item()
        alpha, sigma = 1 / math.hypot(1, sigma_hat), sigma_hat / math.hypot(1, sigma_hat)
        return ((x.double() - alpha * self.data(x.double(), alpha, sigma)) / sigma).to(x.dtype)


class FlowMixture(Mixture):
    """Its velocity on a flow."""

    def __call__(self, x, t):
        s = t.double().item() / 1000
        alpha = max(1 - s, 1e-6)
        return ((x.double() - self.data(x.double(), alpha, s)) / s).to(x.dtype)


def calibrate(model, counts=(3, 5), **options):
    options = {"sample_shape": (3,), "num_trajectories": 24, "budget": 6000, "generator": seeded(0), **OPTIONS, **options}
    return AtlasMultistepScheduler.calibrate(model, counts, **options)


def sample(scheduler, model, noise, steps):
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


@pytest.fixture(scope="module")
def model_and_scheduler():
    model = Mixture()
    return model, calibrate(model)


@pytest.fixture(scope="module")
def exact(model_and_scheduler):
    """Start noise of another seed, and where 400 steps of the plain solver take it."""
    noise = torch.randn(200, 3, generator=seeded(7), dtype=torch.float64)
    return noise, sample(AtlasMultistepScheduler(**CONFIG), Mixture(), noise, 400)


def test_other_trajectories_come_closer_to_the_ode(model_and_scheduler, exact):
    """On average, and far more so for most: a few pass close to a watershed between modes."""
    model, scheduler = model_and_scheduler
    noise, ends = exact
    plain = AtlasMultistepScheduler(**CONFIG)
    for steps in (3, 5):
        found, base = ((sample(s, Mixture(), noise, steps) - ends).square().mean(1).sqrt() for s in (scheduler, plain))
        assert found.mean() < 0.65 * base.mean() and found.median() < 0.25 * base.median()
        report = scheduler.calibration_report.steps[steps]
        assert report.kept and report.calibrated < report.uncalibrated
        assert report.uncalibrated == pytest.approx(base.mean().item(), rel=0.5)
        assert 0 < report.standard_error < report.calibrated and list(report.restarts) == sorted(report.restarts)
        assert len(report.restarts) > 2 and report.calibrated <= report.restarts[0] < report.restarts[-1]


@pytest.fixture(scope="module")
def of_flow():
    return calibrate(FlowMixture(), (3, 5), config={"shift": 3.0})


def test_a_flow_is_calibrated_from_its_pure_noise_whose_scale_is_that_of_the_first_node(of_flow):
    noise, plain = torch.randn(200, 3, generator=seeded(7), dtype=torch.float64), AtlasMultistepScheduler(shift=3.0)
    ends = sample(plain, FlowMixture(), noise, 400)
    for steps in (3, 5):
        found, base = ((sample(s, FlowMixture(), noise, steps) - ends).square().mean(1).sqrt() for s in (of_flow, plain))
        assert found.mean() < 0.5 * base.mean() and found.median() < 0.1 * base.median()
        assert of_flow.calibration_report.steps[steps].calibrated == pytest.approx(found.mean().item(), rel=1.0)


def test_tables_of_another_shift_are_named(of_flow):
    """Which the resolution decides in most pipelines; the same shift may come as mu."""
    calibration = of_flow.config.calibration
    same = AtlasMultistepScheduler(use_flow_sigmas=True, use_dynamic_shifting=True, calibration=calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.set_timesteps(5, mu=math.log(3.0))
        of_flow.set_timesteps(5)
    torch.testing.assert_close(same.sigmas, of_flow.sigmas)
    with pytest.warns(UserWarning, match=r"calibrated for a flow of shift 3 \(mu=1.1\), the call has 2.014"):
        same.set_timesteps(5, mu=0.7)


def test_the_report_counts_network_calls(model_and_scheduler):
    model, scheduler = model_and_scheduler
    report = scheduler.calibration_report
    assert report.network_calls == model.calls and report.teacher_calls == 24 * 36 + 4 * (36 + 72)
    assert 0.8 * 6000 < report.network_calls <= 6000


def test_default_cost_of_four_step_counts():
    scheduler = calibrate(Mixture(), (5, 6, 8, 10), num_trajectories=64, budget=15_000)
    assert 13_500 <= scheduler.calibration_report.network_calls <= 15_000


def test_gaussian_data_are_exact_with_any_number_of_steps():
    """Their flow is a scaling of x about a centre; with centre 0 the scalar of every step is all it takes."""
    data, process = Gaussian(0.0, 0.3), AtlasMultistepScheduler(**CONFIG)

    def model(x, t):
        sigma_hat = process.process.finite.sigma_hat_at(t.double(), log=True).item()
        return data.network("epsilon", x, 1 / math.hypot(1, sigma_hat), sigma_hat / math.hypot(1, sigma_hat))

    scheduler = calibrate(model, (2, 4), sample_shape=(6,))
    noise = torch.randn(20, 6, generator=seeded(3), dtype=torch.float64)
    level = process.process.sigma_hats[-1].item()
    start = data.flow(torch.ones(()), 1 / math.hypot(1, level), level / math.hypot(1, level))
    for steps in (2, 4):
        torch.testing.assert_close(sample(scheduler, model, noise, steps), noise * 0.3 / start, rtol=0, atol=5e-4)


class Rows(FunctionModel):
    """The mixture with start noise that is given."""

    def __init__(self, noise, config=CONFIG):
        super().__init__(Mixture(), AtlasMultistepScheduler(**config), noise.shape[1:], range(len(noise)), len(noise), "cpu")
        self.noise = noise


def sigma_range(model):
    return [level.sigma_hat for level in reversed(model.scheduler.process.ends)]


def test_the_teacher_solves_the_ode(exact):
    """On average over trajectories, some of which pass close to a watershed between modes."""
    noise, ends = exact
    model = Rows(noise)
    for steps, tolerance in ((36, 1.5e-3), (48, 5e-4), (96, 1e-4)):
        found = run_teacher(model, teacher_sigmas(*sigma_range(model), steps))
        assert (found.ends - ends).square().mean(1).sqrt().mean() < tolerance
        assert found.states.shape == (steps, 200, 3) and torch.equal(found.states[0], noise)


@pytest.mark.parametrize("ripple, expected", [((0.0, 20), 36), ((0.1, 20), 72), ((0.2, 40), 144)])
def test_a_teacher_takes_as_many_steps_as_a_stiff_flow_asks_for(ripple, expected):
    """Of the mixture 36 suffice; with ripples on its noise prediction, as strong guidance makes them, they do not."""
    height, waves = ripple
    model = Rows(torch.randn(16, 3, generator=seeded(7), dtype=torch.float64))
    model.predict = lambda x, t: Mixture()(x, t) + height * torch.sin(waves * x)
    assert teacher_steps_that_suffice(model, model.plain(5), 36) == expected


def test_one_node_of_the_teacher_lies_above_thirty():
    """Between σ̂ = 30 and the 20,000 at which a cosine schedule begins, the flow of data of unit size is straight."""
    sigmas = np.array(teacher_sigmas(0.01, 20_000.0, 36))
    assert sigmas[0] == 20_000 and sigmas[1] == 30 and len(sigmas) == 36
    np.testing.assert_allclose(np.diff(np.arcsinh(sigmas[1:] / 0.05), 2), 0, atol=1e-9)
    assert teacher_sigmas(0.01, 14.6, 36)[0] == 14.6 and teacher_sigmas(0.01, 14.6, 36)[-1] == 0.01


def test_placement_residuals_are_ridge_regressions():
    model = Rows(torch.randn(30, 3, generator=seeded(1), dtype=torch.float64))
    teacher = run_teacher(model, teacher_sigmas(*sigma_range(model), 20))
    placement, nodes, ridge = Placement(teacher), (0, 7, 12), 1e-3
    columns = torch.stack([teacher.states[12], *(teacher.velocities[n] for n in nodes)], -1).flatten(0, 1)
    for target, state in ((15, teacher.states[15]), (20, teacher.ends)):
        wanted = (state - teacher.states[12]).flatten()
        norms = columns.square().mean(0).sqrt()
        stacked = torch.cat((columns / norms / 90**0.5, ridge**0.5 * torch.eye(4, dtype=torch.float64)))
        solution = torch.linalg.lstsq(stacked, torch.cat((wanted / 90**0.5, torch.zeros(4)))[:, None]).solution[:, 0]
        left = wanted - columns / norms @ solution
        expected = (left.square().mean() + ridge * solution.square().sum()).sqrt().item()
        assert placement.residual(nodes, target, ridge) == pytest.approx(expected, rel=1e-6)


def test_few_trajectories_that_no_coefficients_serve_do_not_decide():
    """Against a general optimiser of the sum of distances: far closer to it than least squares."""
    columns = torch.randn(40, 5, 3, generator=seeded(4), dtype=torch.float64)
    wanted = columns @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    wanted = wanted + 0.05 * torch.randn(40, 5, generator=seeded(5), dtype=torch.float64)
    wanted[:4] += 3.0

    def loss(c):
        return np.linalg.norm(wanted.numpy() - columns.numpy() @ np.asarray(c), axis=1).mean()

    least = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000}).fun
    squares = least_squares(columns.flatten(0, 1), wanted.flatten(), 1e-12)
    expected = np.linalg.lstsq(columns.flatten(0, 1).numpy(), wanted.flatten().numpy())[0]
    np.testing.assert_allclose(squares.numpy(), expected, atol=1e-8)
    assert loss(ridge_solution(columns, wanted, 1e-12)) - least < 0.2 * (loss(squares) - least)


def test_a_ridge_is_chosen_by_trajectories_that_it_was_not_fitted_to(monkeypatch):
    """One of three candidates serves the others, though the rows that it was fitted to like another one better."""
    generator = seeded(1)
    states, velocities = (torch.randn(2, 8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    train = torch.arange(8) < 4
    teacher = Trajectories([2.0, 0.5], states, velocities, torch.zeros(8, 3, dtype=torch.float64))
    fitting = Fit(teacher, [0, 1], train)
    row = adams_bashforth(fitting.angles[:1], fitting.angles[1])
    wanted, columns = states[1] - states[0] - row[0] * velocities[0], torch.stack([velocities[0], states[0]], -1)
    of_train, of_others = (least_squares(columns[rows].flatten(0, 1), wanted[rows].flatten(), 0) for rows in (train, ~train))
    candidates = iter((of_train, of_others, 0 * of_train))
    monkeypatch.setattr(fit_module, "ridge_solution", lambda *arguments: next(candidates))
    fitting(0, states[0], velocities[0])
    assert fitting.scales == [pytest.approx(of_others[-1].item())]
    assert fitting.weights[0] == [pytest.approx(row[0] + of_others[0].item())]


def test_a_calibration_that_is_no_better_is_not_kept():
    """Data N(0, 1) have velocity zero, which the plain solver of their scale follows exactly."""
    config = {**CONFIG, "prediction_type": "v_prediction", "angle_scale": 1.0}
    with pytest.warns(UserWarning, match="3 steps: on held-out trajectories calibration gives .* which is kept"):
        scheduler = calibrate(lambda x, t: torch.zeros_like(x), (3,), config=config)
    assert scheduler.calibrated_steps == [] and not scheduler.calibration_report.steps[3].kept


BEFORE = 24 * 3 + 4 * (36 + 72)  # the plain solver, and whether the teacher's steps suffice


class Rough(Mixture):
    """A network that is not smooth in x, so that the corrected states of the teacher are not those that it was called at."""

    def __call__(self, x, t):
        return super().__call__(x, t) + 0.02 * torch.sin(40 * x)


def test_an_interrupted_teacher_goes_on_from_its_cache(tmp_path):
    options = {"batch_size": 8, "cache": tmp_path, "counts": (3,)}
    with pytest.raises(KeyboardInterrupt):
        calibrate(Rough(fails_after=BEFORE + 38 * 8 + 40), **options)
    assert [file.name for file in tmp_path.iterdir()] == ["teacher-00000.safetensors"]
    resumed = calibrate(Rough(), **options)
    assert resumed.calibration_report.teacher_calls == 4 * (36 + 72) + 38 * 16 + 2 * 8  # two calls a trajectory tell the model
    assert resumed.config.calibration == calibrate(Rough(), (3,), batch_size=8).config.calibration
    with pytest.raises(ValueError, match="teacher-00000.safetensors belongs to another calibration"):
        calibrate(Rough(), **options, generator=seeded(1))
    with pytest.raises(ValueError, match="teacher-00000.safetensors belongs .*: the model, its prompts or its guidance scale"):
        calibrate(lambda x, t: 1.1 * Rough()(x, t), **options)


def test_an_interrupted_search_loses_one_table(tmp_path):
    whole = calibrate(Rough(), (3,))
    before = BEFORE + 24 * (36 + 2) + 24 * 3 * 5
    with pytest.raises(KeyboardInterrupt):
        calibrate(Rough(fails_after=before + 1), (3,), cache=tmp_path)
    resumed = calibrate(Rough(), (3,), cache=tmp_path)
    assert resumed.config.calibration == whole.config.calibration
    assert resumed.calibration_report.network_calls == whole.calibration_report.network_calls - 24 * (36 + 3 * 5) + 24 * 2
    again = calibrate(Rough(), (3,), cache=tmp_path)
    assert again.calibration_report.network_calls == BEFORE + 24 * 2
    assert again.config.calibration == whole.config.calibration


def test_a_cut_write_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    from atlas_diffusers.schedulers.calibration import cache

    calibrate(Rough(), (3,), cache=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(cache, "save_file", full_disk)
    (tmp_path / "teacher-00000.safetensors").unlink()
    with pytest.raises(OSError, match="no space"):
        calibrate(Rough(), (3,), cache=tmp_path)
    before.pop("teacher-00000.safetensors")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_tables_are_chosen_by_trajectories_that_they_were_not_fitted_to():
    """Nine noise-like trajectories in one dimension: the more nodes, the better the fit, which says nothing about others."""
    report = {}
    model = Rows(torch.randn(9, 3, generator=seeded(2), dtype=torch.float64))
    teacher = run_teacher(model, teacher_sigmas(*sigma_range(model), 36))
    calibrator = Calibrator(model, teacher, {6: model.plain(6)}, None)
    table, report = calibrator.table(6, 12)
    errors = follow(model, teacher, table).errors
    held_out = torch.tensor([2, 5, 8])
    assert report.calibrated == pytest.approx(errors[held_out].mean().item(), rel=1e-6)
    assert report.calibrated > 1.5 * errors[torch.tensor([0, 1, 3, 4, 6, 7])].mean().item()


@pytest.mark.parametrize("options, message", [
    ({"num_trajectories": 7}, "num_trajectories of at least 8.*got 7"),
    ({"counts": (5, 1)}, r"step counts of at least 2.*\[5, 1\]"),
    ({"counts": ()}, r"\[\]"),
    ({"teacher_steps": 6}, "twice as many teacher_steps.* 6"),
    ({"sample_shape": None}, "needs sample_shape and config"),
    ({"config": {"use_flow_sigmas": True, "use_dynamic_shifting": True}}, "called without mu; give config with shift"),
    ({"prompts": ["red heart"]}, "call and prompts are for a pipeline"),
    ({"model": lambda x, t: x[:, :2]}, r"returned shape \(24, 2\) for samples of shape \(24, 3\)"),
    ({"model": lambda x, t: x * math.nan}, "returned NaN or infinity at timestep 999"),
])  # fmt: skip
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(**{"model": Mixture(), **options})


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_pipeline_is_calibrated_as_it_is_called(guidance_scale, tmp_path):
    """The tables come from the pipeline's own guided predictions, so a pipeline call ends where the report says."""
    pipeline = build_tiny_pipeline()
    prompts = ["red heart", "blue star"]
    options = {"num_trajectories": 9, "teacher_steps": 96, "budget": 1500, "prompts": prompts, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so small a network may be followed best by the plain solver
        scheduler = AtlasMultistepScheduler.calibrate(
            pipeline, (3,), guidance_scale=guidance_scale, generator=seeded(0), **options
        )
    seeds = torch.randint(2**62, (9,), generator=seeded(0)).tolist()
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=seeded(seed)) for seed in seeds])
    pipeline.scheduler = AtlasMultistepScheduler.from_config(scheduler.config, calibration=None)
    call = {"guidance_scale": guidance_scale, "output_type": "latent", "latents": noise}
    texts = [prompts[row % 2] for row in range(9)]
    plain = pipeline(texts, num_inference_steps=3, **call).images
    fine = pipeline(texts, num_inference_steps=100, **call).images
    error = (plain - fine)[2::3].flatten(1).square().mean(1).sqrt().mean().item()
    assert scheduler.calibration_report.steps[3].uncalibrated == pytest.approx(error, rel=0.1)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(tmp_path)
    assert AtlasPipeline.from_pretrained(tmp_path).scheduler._calibration == scheduler._calibration


def test_a_pipeline_without_text_takes_no_prompts(tiny_pipeline):
    tiny_pipeline.text_encoder = None
    with pytest.raises(ValueError, match="this pipeline has no text_encoder; give prompt_embeds"):
        AtlasMultistepScheduler.calibrate(tiny_pipeline, (3,), prompts=["red heart"], progress=False)


@pytest.fixture(scope="module")
def raw():
    """The mixture's trajectories in float64, and four nodes with the weights of Adams-Bashforth of order 2."""
    model = Rows(torch.randn(48, 3, generator=seeded(5), dtype=torch.float64))
    teacher = run_teacher(model, teacher_sigmas(*sigma_range(model), 36))
    sigmas = [teacher.sigmas[node] for node in (0, 14, 22, 30)]
    angles = [*np.arctan(sigmas), 0.0]
    weights = [[0.0] * max(0, n - 1) + adams_bashforth(angles[max(0, n - 1) : n + 1], angles[n + 1]) for n in range(4)]
    return model, teacher, follow(model, teacher, StepTable(sigmas, weights, [0.0] * 4)), torch.arange(48) % 3 != 2


def test_differences_are_those_of_the_whole_table(raw):
    """Where a number is changed in the middle, only the calls after it are made again; the end is that of all calls."""
    model, teacher, candidate, _ = raw
    unknowns = affordable(4, 1000)
    assert len(unknowns) == 2 + 3 + 4 + 5 + 3  # rows with their scales, and all nodes but the first
    before = model.calls
    columns = derivatives(model, candidate, unknowns)
    assert model.calls - before == 48 * (1 + sum(unknown.cost for unknown in unknowns))
    for unknown, column in zip(unknowns, columns.unbind(-1)):
        moved = follow(model, teacher, unknown.changed(candidate.table, DIFFERENCE)).way.ends
        torch.testing.assert_close(column, (moved - candidate.way.ends) / DIFFERENCE, rtol=0, atol=1e-9)


@pytest.mark.parametrize("budget", [3, 14, 22, 60])
def test_a_refined_table_is_better_on_trajectories_held_out(raw, budget):
    model, teacher, candidate, train = raw

    def score(errors):
        return errors[~train].mean().item()

    before = model.calls
    found, spent = refine(model, teacher, candidate, train, budget, score)
    assert model.calls - before == 48 * spent and spent <= budget
    assert (found is candidate) == (budget == 3)
    assert score(found.errors) <= {3: 1.0, 14: 0.8, 22: 0.7, 60: 0.4}[budget] * score(candidate.errors)


def test_steps_that_do_not_help_are_not_taken(raw):
    model, teacher, candidate, train = raw
    assert refine(model, teacher, candidate, train, 60, lambda errors: 0.0)[0] is candidate
