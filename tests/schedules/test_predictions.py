import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import prediction

from atlas_diffusers.schedules import PREDICTION_TYPES, data_coefficients, noise_coefficients, output_coefficients
from atlas_diffusers.schedules.predictions import step_coefficients

VALUES = st.floats(-5, 5)


@given(st.sampled_from(PREDICTION_TYPES), st.floats(1e-3, 1 - 1e-6), VALUES, VALUES)
def test_round_trip(prediction_type, alpha, data, noise):
    sigma = (1 - alpha**2) ** 0.5
    x = alpha * data + sigma * noise
    a, b = output_coefficients(prediction_type, alpha, sigma)
    output = a * noise + b * data
    assert output == pytest.approx(prediction(prediction_type, data, noise, alpha, sigma), abs=1e-12)
    a, b = data_coefficients(prediction_type, alpha, sigma)
    assert a * x + b * output == pytest.approx(data, abs=1e-10)
    a, b = noise_coefficients(prediction_type, alpha, sigma)
    assert a * x + b * output == pytest.approx(noise, abs=1e-10)
    a, b = step_coefficients(prediction_type, (alpha, sigma), (0.9, 0.3))
    assert a * x + b * output == pytest.approx(0.9 * data + 0.3 * noise, abs=1e-10)


@given(st.floats(1e-6, 1), st.floats(0, 1))
def test_on_a_flow_the_sample_is_not_scaled(s, target):
    """So that a step is one pass over memory."""
    a, b = step_coefficients("flow_prediction", (1 - s, s), (1 - target, target))
    assert a == 1 and b == pytest.approx(target - s, abs=1e-15)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_data_at_zero_signal(prediction_type):
    a, b = data_coefficients(prediction_type, 0.0, 1.0)
    assert a * 0.7 + b * prediction(prediction_type, -0.3, 0.7, 0.0, 1.0) == pytest.approx(-0.3)


@pytest.mark.parametrize("coefficients", [data_coefficients, noise_coefficients, output_coefficients])
def test_unknown_type_lists_the_known_ones(coefficients):
    with pytest.raises(ValueError) as error:
        coefficients("velocity", 0.6, 0.8)
    assert "'velocity'" in str(error.value) and all(name in str(error.value) for name in PREDICTION_TYPES)
