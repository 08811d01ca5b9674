"""Every loss against a naive version in float64, and known traps."""

import math

import pytest
import torch

from kdlib.models.masks import length_mask
from kdlib.objectives import losses

B, T, V, BLANK = 3, 7, 11, 2


@pytest.fixture
def batch():
    """Student's logits, teacher's logits, lengths; the padding is arbitrary."""
    generator = torch.Generator().manual_seed(0)
    logits, target = (3 * torch.randn(B, T, V, generator=generator) for _ in range(2))
    lengths = torch.tensor([7, 4, 1])
    target[~length_mask(lengths, T)] = 77.0
    return logits, target, lengths


def naive(logits, target, weights, divide_q, divide_p, scale):
    """The definition, row by row."""
    total = norm = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            p = torch.softmax(target[b, t].double() / divide_p, 0)
            log_q = torch.log_softmax(logits[b, t] / divide_q, 0)
            total = total + weights[b, t] * (p * (p.log() - log_q)).sum()
            norm = norm + weights[b, t]
    return scale * total / norm


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    ("divided", "q", "p", "scaled"), [("both", 1, 1, 2), ("student", 1, 0, 0), ("teacher", 0, 1, 0)]
)
def test_soft_kl_and_its_gradient_match_the_definition(batch, temperature, divided, q, p, scaled):
    logits, target, lengths = batch
    weights = length_mask(lengths, T).float() * torch.tensor([0.3, 1.0, 2.0])[:, None]
    tested, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    softened = target if divided == "student" else target / temperature
    loss = losses.soft_kl(tested, softened, weights, temperature**q, squared=divided == "both")
    expected = naive(exact, target, weights, temperature**q, temperature**p, temperature**scaled)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (tested.grad - exact.grad).abs().max() < 1e-5
    assert tested.grad[~length_mask(lengths, T)].abs().max() == 0


def test_soft_kl_in_chunks_equals_soft_kl_as_a_whole(batch, monkeypatch):
    logits, target, lengths = batch
    weights = length_mask(lengths, T).float()
    whole = losses.soft_kl(logits, target, weights, 2.0)
    monkeypatch.setitem(losses.CHUNK, "cpu", V)  # one row per chunk
    assert losses.soft_kl(logits, target, weights, 2.0) == pytest.approx(whole.item(), rel=1e-6)
    full = torch.ones(B, T)
    target = target.clamp_max(10)
    by_row, at_once = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses.soft_kl(by_row, target, full, 2.0).backward()
    monkeypatch.setitem(losses.CHUNK, "cpu", 2**18)
    losses.soft_kl(at_once, target, full, 2.0).backward()
    assert torch.allclose(by_row.grad, at_once.grad, atol=1e-7)


def test_soft_kl_at_the_original_studys_size_is_exact_to_a_ten_thousandth():
    generator = torch.Generator().manual_seed(1)
    logits, target = (5 * torch.randn(2, 30, 5000, generator=generator) for _ in range(2))
    tested, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses.soft_kl(tested, target / 2, torch.ones(2, 30), 2.0).backward()
    q, p = exact / 2, (target.double() / 2).log_softmax(-1)
    (4 * (p.exp() * (p - q.log_softmax(-1))).sum(-1).mean()).backward()
    assert (tested.grad - exact.grad).abs().max() < 1e-4 * exact.grad.abs().max()


def test_logits_and_log_probabilities_are_equivalent_targets(batch):
    logits, target, lengths = batch
    weights = length_mask(lengths, T).float()
    from_logits = losses.soft_kl(logits, target, weights, 3.0)
    from_log_probs = losses.soft_kl(logits, target.log_softmax(-1), weights, 3.0)
    assert from_logits.item() == pytest.approx(from_log_probs.item(), rel=1e-5)


def test_a_target_at_its_temperature_is_not_softened_again(batch):
    """Neither as logits, nor as log-probabilities, which have no other temperature."""
    logits, target, lengths = batch
    weights = length_mask(lengths, T).float()
    once = naive(logits.double(), target, weights, 2.0, 2.0, 4.0).item()
    assert losses.soft_kl(logits, target / 2, weights, 2.0).item() == pytest.approx(once, rel=1e-5)
    fixed = losses.soft_kl(logits, (target / 2).log_softmax(-1), weights, 2.0)
    assert fixed.item() == pytest.approx(once, rel=1e-5)


def test_a_second_backward_is_an_error(batch):
    logits, target, lengths = batch
    logits.requires_grad_()
    loss = losses.soft_kl(logits, target, length_mask(lengths, T).float(), 2.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through the same loss"):
        loss.backward()


def test_with_zero_weights_the_loss_and_its_gradient_are_zero(batch):
    logits, target, _ = batch
    logits.requires_grad_()
    loss = losses.soft_kl(logits, target, torch.zeros(B, T), 2.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_kl_is_a_mean_over_frames_not_over_tokens_or_padding():
    """Three traps: PyTorch's reduction="mean" divides by V too, "batchmean" by B alone, softmax over dim 1 is time."""
    logits = torch.zeros(2, 5, V)
    target = torch.full((2, 5, V), losses.MASKED_LOGIT)
    target[..., 4] = 0.0
    weights = torch.tensor([[1.0, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    assert losses.soft_kl(logits, target, weights).item() == pytest.approx(math.log(V), rel=1e-6)


def test_half_precision_gets_half_precision_gradients(batch):
    logits, target, lengths = batch
    half = logits.bfloat16().requires_grad_()
    losses.soft_kl(half, target, length_mask(lengths, T).float(), 2.0).backward()
    assert half.grad.dtype == torch.bfloat16


def spiking(places, length=T):
    """A target [1, length, V] with token 5 at places, and the blank elsewhere."""
    target = torch.zeros(1, length, V)
    target[..., BLANK] = 4.0
    target[0, places, 5] = 8.0
    return target


@pytest.mark.parametrize(
    ("blanks", "context_frames", "expected"),
    [
        ("all", 0, [1, 1, 1, 1, 1, 1, 0]),
        ("drop_blank", 0, [0, 0, 1, 0, 0, 1, 0]),
        ("symmetric", 1, [0, 1, 1, 1, 1, 1, 0]),  # frame 6 is padding
        ("symmetric", 0, [0, 0, 1, 0, 0, 1, 0]),
    ],
)
def test_frame_weights(blanks, context_frames, expected):
    weights = losses.frame_weights(spiking([2, 5, 6]), torch.tensor([6]), blanks, BLANK, context_frames)
    assert weights[0].tolist() == expected


@pytest.mark.parametrize(("student", "teacher", "shift"), [([4], [2], 2), ([1], [3], -2), ([3], [3], 0), ([6], [0], 0)])
def test_the_best_shift_aligns_the_spikes_of_target_and_student(student, teacher, shift):
    """The last pair is six frames apart, more than the largest shift: it is not shifted."""
    logits, target, lengths = spiking(student), spiking(teacher), torch.tensor([7])
    shifts, fit = losses.best_shift(logits, target, lengths, 3, BLANK)
    assert shifts.tolist() == [shift]
    moved = losses.shift_frames(target, shifts, lengths)
    if (student, teacher) != ([6], [0]):
        assert fit.item() > 0.95  # zeros fill the gap, where the other side is not exactly zero
        assert torch.equal(moved, logits)


def test_shifting_does_not_bring_in_padding():
    target = spiking([3], length=6)
    target[0, 4:] = 99.0
    moved = losses.shift_frames(target, torch.tensor([-2]), torch.tensor([4]))
    assert moved[0, :4].argmax(-1).tolist() == [BLANK, 5, 5, 5]  # the last frame is repeated


def test_masked_specials_have_no_probability_in_the_first_step(batch):
    _, target, _ = batch
    changed = losses.mask_specials(target, (0, 1, 2))
    assert changed[:, 0].softmax(-1)[:, :3].max() == 0
    assert torch.equal(changed[:, 1:], target[:, 1:])
    rest = target[:, 0, 3:].softmax(-1)
    assert torch.allclose(changed[:, 0].softmax(-1)[:, 3:], rest)
    assert losses.soft_kl(torch.zeros_like(target), changed, torch.ones(B, T)).isfinite()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pseudo_labels_count_where_the_teacher_is_confident(batch, smoothing):
    logits, target, lengths = batch
    inside, confidence, nonblank = length_mask(lengths, T), 0.5, 0.6
    total, counted = 0.0, 0
    for b in range(B):
        for t in range(T):
            p = target[b, t].double().softmax(0)
            if inside[b, t] and p.max() >= confidence and 1 - p[BLANK] >= nonblank:
                expected = torch.full((V,), smoothing / V, dtype=torch.float64)
                expected[p.argmax()] += 1 - smoothing
                total, counted = total - (expected * logits[b, t].double().log_softmax(0)).sum(), counted + 1
    options = {"confidence": confidence, "min_nonblank": nonblank, "smoothing": smoothing, "blank": BLANK}
    loss = losses.pseudo_label(logits, target, inside.float(), **options)
    assert 0 < counted < inside.sum()
    assert loss.item() == pytest.approx(total.item() / counted, rel=1e-5)


def test_without_a_confident_teacher_there_is_no_pseudo_label(batch):
    logits, target, lengths = batch
    loss = losses.pseudo_label(logits, target, length_mask(lengths, T).float(), confidence=1.0 + 1e-9)
    assert loss.item() == 0


def test_features_are_compared_after_projection_and_without_padding(batch):
    _, _, lengths = batch
    generator = torch.Generator().manual_seed(3)
    encoded, target = torch.randn(B, T, 4, generator=generator), torch.randn(B, T, 6, generator=generator)
    project = torch.nn.Linear(4, 6)
    inside = length_mask(lengths, T)
    rows = [(b, t) for b in range(B) for t in range(T) if inside[b, t]]
    weight, bias = project.weight.double(), project.bias.double()
    exact = sum(((weight @ encoded[b, t].double() + bias - target[b, t].double()) ** 2).mean() for b, t in rows)
    loss = losses.feature_mse(encoded, target, inside.float(), project)
    assert loss.item() == pytest.approx(exact.item() / len(rows), rel=1e-5)
    loss.backward()
    assert project.weight.grad.abs().max() > 0


def test_a_masked_vocabulary_has_a_finite_divergence_and_the_right_gradient():
    """-inf on one side of the target's tokens, on both sides, and on the student's alone, where the KL is infinite."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    target[..., 4] = -torch.inf
    weights = torch.ones(2, 3)
    for both in (False, True):
        student = logits.clone()
        if both:
            student[..., 4] = -torch.inf
        student.requires_grad_()
        keep = [token for token in range(9) if token != 4] if both else list(range(9))
        p, q = target.double()[..., keep].softmax(-1), student.detach().double()[..., keep].log_softmax(-1)
        expected = torch.nn.functional.kl_div(q, p, reduction="none").sum(-1).mean()
        loss = losses.soft_kl(student, target, weights)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (grad,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(grad).all()
    student = logits.clone()
    student[..., 2] = -torch.inf
    assert losses.soft_kl(student, target, weights).item() == torch.inf
