import pytest
import torch
from exact import SCHEDULES, Mixture
from test_sampler import SAMPLERS

from dit.sampler.editing import edited, mixed, noised, shrunk

F64 = torch.float64
LEFT = torch.zeros(2, 2, dtype=torch.bool)
LEFT[:, :1] = True
DATA = Mixture([[0.9, 0.9, 0.9, 0.9], [-0.9, -0.9, -0.9, -0.9]], 0.1)  # pictures that are white, or black


def denoise(schedule):
    exact = DATA.denoise(schedule)

    def estimate(x, t):
        said = exact(x.flatten(1), t)
        return type(said)(said.x0.reshape(x.shape), said.eps.reshape(x.shape))

    return estimate


def draw(sampler, name, number=50, num_steps=40, seed=0):
    schedule, lay_out = SCHEDULES[name]
    generator = torch.Generator().manual_seed(seed)
    times = lay_out(schedule, num_steps)
    x = schedule(times[0]).sigma * torch.randn(number, 1, 2, 2, generator=generator, dtype=F64)
    return sampler(denoise(schedule), schedule, x, times, generator=generator)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["linear", "zero_terminal_snr", "edm", "flow"])
def test_strength_zero_returns_the_picture_one_forgets_it_and_between_it_is_like_it(name, sampler):
    x0 = torch.full((1, 2, 2), 0.9, dtype=F64)
    returned = draw(edited(SAMPLERS[sampler], x0, strength=0.0), name)
    assert torch.equal(returned, x0.expand(50, 1, 2, 2))
    forgotten = draw(edited(SAMPLERS[sampler], x0, strength=1.0), name)
    assert torch.equal(forgotten, draw(SAMPLERS[sampler], name))
    assert 0.2 < (forgotten.mean((1, 2, 3)) > 0).double().mean() < 0.8
    like = draw(edited(SAMPLERS[sampler], x0, strength=0.3), name)
    assert (like.mean((1, 2, 3)) > 0).all() and not torch.equal(like, returned)


@pytest.mark.parametrize("resample", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["linear", "zero_terminal_snr", "edm", "flow"])
def test_what_is_kept_stays_and_what_is_drawn_agrees_with_it(name, sampler, resample):
    x0 = torch.full((1, 2, 2), -0.85, dtype=F64)
    drawn = draw(edited(SAMPLERS[sampler], x0, mask=LEFT, resample=resample), name)
    torch.testing.assert_close(drawn[..., 1:], x0[..., 1:].expand(50, 1, 2, 1), atol=1e-9, rtol=0)
    agreeing = (drawn[..., :1].mean((1, 2, 3)) < 0).double().mean()
    assert agreeing > (0.95 if resample > 1 else 0.8)
    assert drawn[..., :1].std() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_taken_again_begin_at_their_own_noise(sampler):
    """Also the last step, to 0: asked at t, the denoiser always sees pictures with the noise of t."""
    schedule, lay_out = SCHEDULES["linear"]
    data = Mixture([[0.0]], 0.5)

    def denoise(x, t):
        alpha, sigma = schedule(t)
        expected = (alpha**2 * 0.25 + sigma**2).sqrt()
        assert x.std().item() == pytest.approx(expected.item(), rel=0.1)
        return data.denoise(schedule)(x, t)

    times = lay_out(schedule, 100)
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    again = edited(SAMPLERS[sampler], torch.zeros(1, dtype=F64), resample=2)
    drawn = again(denoise, schedule, x, times, generator=torch.Generator().manual_seed(1))
    assert drawn.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noising_again_gives_the_schedules_noise(name):
    schedule, _ = SCHEDULES[name]
    s, t = torch.tensor([0.2, 0.7], dtype=F64) * schedule.t_max
    generator = torch.Generator().manual_seed(0)
    x_s = schedule(s).alpha * 0.5 + schedule(s).sigma * torch.randn(100_000, generator=generator, dtype=F64)
    x_t = noised(schedule, x_s, s, t, generator)
    assert x_t.mean().item() == pytest.approx(0.5 * float(schedule(t).alpha), abs=0.02 * float(schedule(t).sigma))
    assert x_t.std().item() == pytest.approx(float(schedule(t).sigma), rel=0.02)


def test_mixed_noise_is_noise():
    a, b = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixed(a, b, 0.0), a)
    torch.testing.assert_close(mixed(a, b, 1.0), b, atol=1e-6, rtol=0)
    assert mixed(a, b, 0.3).std().item() == pytest.approx(1, abs=0.01)


def test_a_latents_cell_is_redrawn_where_any_of_its_pixels_is():
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[9, 3] = True
    cells = shrunk(mask, 2)
    assert cells.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, r"strength=1\.5"),
        ({"strength": -0.1}, r"strength=-0\.1"),
        ({"resample": 0}, "resample=0"),
        ({"mask": torch.zeros(3, 2, dtype=torch.bool)}, r"the mask is \(3, 2\), but the picture \(2, 2\)"),
    ],
)
def test_bad_edits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        edited(SAMPLERS["ddim"], torch.zeros(1, 2, 2), **options)
