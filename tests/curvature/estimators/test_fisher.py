"""The empirical Fisher against gradients of the loss, a closed form, and what it must not be confused with."""

from __future__ import annotations

import pytest
import torch
from exact_curvature import linears, tiny_llama
from torch import Tensor, nn

from hestia.curvature import calibrate
from hestia.errors import CalibrationError
from hestia.quant import Quantizer, QuantSpec

torch.set_num_threads(1)

IDS = torch.randint(0, 12, (3, 7), generator=torch.Generator().manual_seed(1))


def test_samples_are_squared_gradients_of_the_summed_loss_over_n() -> None:
    """||d(sum of -log p)/dW||^2 / N by the library's loss; quadratic and delta_loss by dense arithmetic."""
    model = tiny_llama()
    weights = linears(model)
    spec = QuantSpec()
    found = calibrate(model, weights, IDS, estimator="fisher", candidates={"ternary": spec})
    for k, ids in enumerate(IDS):
        loss = nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        for path, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            tensor = found.tensors[path]
            error = Quantizer(spec).codes(weights[path].detach()).dense().double() - weights[path].detach()
            assert tensor.samples[k] == pytest.approx(float(gradient.square().sum()) / 6, rel=1e-4)
            quadratic = float((gradient * error).sum()) ** 2 / 6
            assert tensor.others["quadratic:ternary"][k] == pytest.approx(quadratic, rel=1e-3, abs=1e-9)
            absolute = float((gradient * error).abs().sum()) / 6**0.5
            assert tensor.others["delta_loss:ternary"][k] == pytest.approx(absolute, rel=1e-4)


class LinearSoftmax(nn.Module):
    """z_t = W a_t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))


def test_closed_form_of_a_linear_model() -> None:
    """||sum_t (p_t - y_t) a_t'||^2 / N."""
    model = LinearSoftmax().double()
    found = calibrate(model, {"head": model.head.weight}, IDS[:, :6] % 11, estimator="fisher", forward=model)
    for k, ids in enumerate(IDS[:, :6] % 11):
        a = model.features(ids[:-1]).detach()
        residual = torch.softmax(model(ids[:-1]).detach(), -1) - nn.functional.one_hot(ids[1:], 11)
        expected = float((residual.T @ a).square().sum()) / 5
        assert found.tensors["head"].samples[k] == pytest.approx(expected, rel=1e-6)


def test_no_randomness_and_labels_matter() -> None:
    model = tiny_llama().float()
    weights = linears(model)
    first = calibrate(model, weights, IDS, estimator="fisher", seed=0)
    assert calibrate(model, weights, IDS, estimator="fisher", seed=1).traces == first.traces
    last = IDS.clone()
    last[:, -1] = (last[:, -1] + 1) % 12  # only ever a label
    assert calibrate(model, weights, last, estimator="fisher").traces != first.traces


def test_labels_drawn_from_the_model_give_the_gauss_newton_trace() -> None:
    """Where the labels follow the model's own distribution, empirical and true Fisher agree in expectation.

    One scored position, so that the flavour (squared after the sum over positions) does not matter.
    """
    model = tiny_llama(scale=0.2)
    weights = linears(model)
    prefix = torch.tensor([[4, 8, 0, 9, 3]])

    def next_word(ids: Tensor) -> Tensor:
        """[1, 2] -> what follows the prefix, whatever the ids say; the second position is not scored."""
        return model(input_ids=prefix).logits[:, -1:].expand(1, 2, 12)

    p = torch.softmax(next_word(prefix)[0, 0].detach(), -1)
    every = torch.stack([torch.zeros(12, dtype=torch.int64), torch.arange(12)], 1)
    fisher = calibrate(model, weights, every, estimator="fisher", forward=next_word)
    draws = [calibrate(model, weights, every[:2], seed=seed, forward=next_word) for seed in range(80)]
    for path in weights:
        exact = sum(float(p[k]) * sample for k, sample in enumerate(fisher.tensors[path].samples))
        values = torch.tensor([draw.traces[path] for draw in draws], dtype=torch.float64)
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 80**0.5, path
        assert float(values.std()) / 80**0.5 < 0.1 * exact, f"{path}: the test has no power"


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="logits are not finite"):
        calibrate(model, linears(model), IDS, estimator="fisher")
