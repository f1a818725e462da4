"""d(loss)/d(psf) and d(loss)/d(rho) through steps of ADMM, against finite differences in float64."""

import dprox as dp
import pytest
import torch
from dprox.algo.admm import ADMM
from dprox.linalg import LinearSolveConfig, linear_solve
from dprox.linop.conv import psf2otf2

from nablasolve.interop import dprox as client

STEPS = 3


class Blur(dp.LinOp):
    """dprox's `conv_doe(circular=True)` without its cast to float32."""

    def __init__(self, arg, psf):
        super().__init__([arg])
        self.psf = torch.nn.Parameter(psf)

    def forward(self, x, **_):
        return torch.fft.ifft2(psf2otf2(self.psf, x.shape) * torch.fft.fft2(x)).real

    def adjoint(self, y, **_):
        return torch.fft.ifft2(psf2otf2(self.psf, y.shape).conj() * torch.fft.fft2(y)).real


class Jump(dp.LinOp):
    def __init__(self, arg, dim):
        super().__init__([arg])
        self.dim = dim

    def forward(self, x, **_):
        return x - x.roll(1, self.dim)

    def adjoint(self, y, **_):
        return y - y.roll(-1, self.dim)


def data(dtype, batch=1):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 1, 12, 12, dtype=torch.float64, generator=generator)
    psf = torch.rand(1, 1, 4, 4, dtype=torch.float64, generator=generator)
    rhos = 0.05 + 0.1 * torch.rand(STEPS, dtype=torch.float64, generator=generator)
    return image.to(dtype), (psf / psf.sum()).to(dtype), rhos.to(dtype)


def loss_of(psf, rhos, y, blur=Blur, **config):
    """The loss after some steps of ADMM, and the operator that holds the psf."""
    x = dp.Variable(value=torch.zeros_like(y))
    op = blur(x, psf)
    psi, omega = ADMM.partition([dp.sum_squares(op - y), dp.norm2(Jump(x, -1)), dp.norm2(Jump(x, -2))])
    config = {"rtol": 1e-13 if y.dtype == torch.float64 else 1e-6, "max_iters": 1000} | config
    solver = ADMM(psi, omega, try_diagonalize=False, linear_solve_config=LinearSolveConfig(**config))
    lams = {fn: torch.full((STEPS,), 0.3, dtype=y.dtype) for fn in psi}
    image = solver.solve(x0=y, rhos=rhos, lams=lams, max_iter=STEPS)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (weights * image).mean() + (image**2).mean(), op


def differences(f, at, h=1e-4):
    """The gradient of `f` by central differences of fourth order."""
    grad = torch.zeros_like(at)
    for i in range(at.numel()):
        e = torch.zeros_like(at)
        e.view(-1)[i] = h
        grad.view(-1)[i] = (8 * (f(at + e) - f(at - e)) - (f(at + 2 * e) - f(at - 2 * e))) / (12 * h)
    return grad


@pytest.fixture(scope="module", params=[1, 2], ids=["one image", "two images"])
def reference(request):
    y, psf, rhos = data(torch.float64, request.param)
    client.install()
    with torch.no_grad():
        of_psf = differences(lambda p: loss_of(p, rhos, y)[0], psf)
        of_rhos = differences(lambda r: loss_of(psf, r, y)[0], rhos)
    client.uninstall()
    return request.param, of_psf, of_rhos


def gradients(dtype, batch, blur=Blur, **config):
    y, psf, rhos = data(dtype, batch)
    rhos.requires_grad_()
    loss, op = loss_of(psf, rhos, y, blur, **config)
    loss.backward()
    return op.psf.grad.double(), rhos.grad.double()


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def circular(x, psf):
    return dp.conv_doe(x, psf, circular=True)


@pytest.mark.parametrize(
    ("dtype", "blur", "tolerance"),
    [(torch.float64, Blur, 1e-8), (torch.float32, Blur, 1e-4), (torch.float32, circular, 1e-4)],
    ids=["float64", "float32", "conv_doe"],
)
@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
def test_gradients_to_psf_and_rho_are_those_of_finite_differences(reference, dtype, blur, tolerance, warm_start):
    batch, of_psf, of_rhos = reference
    client.install(warm_start=warm_start)
    psf_grad, rho_grad = gradients(dtype, batch, blur)
    print(f"\npsf {error(psf_grad, of_psf):.1e}, rho {error(rho_grad, of_rhos):.1e}")
    assert error(psf_grad, of_psf) < tolerance
    assert error(rho_grad, of_rhos) < tolerance


class Tikhonov(Blur):
    """`K^T K + rho I` as dprox's users write it: the psf is a parameter, and rho is closed over."""

    def __init__(self, psf, rho):
        super().__init__(dp.Variable(), psf)
        self.shift = lambda x: rho * x

    def forward(self, x, **_):
        return super().adjoint(super().forward(x)) + self.shift(x)

    adjoint = forward


def tikhonov_gradients(dtype):
    y, psf, rhos = data(dtype)
    rho = rhos[0].clone().requires_grad_()
    A = Tikhonov(psf, rho)
    (
        linear_solve(A, y, LinearSolveConfig(rtol=1e-13 if dtype == torch.float64 else 1e-6, max_iters=1000)) ** 2
    ).mean().backward()
    return A.psf.grad, rho.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_a_closed_over_tensor_has_its_gradient_which_dprox_alone_loses(dtype, tolerance):
    y, psf, rhos = data(torch.float64)
    client.install()

    def loss(psf, rho):
        return (linear_solve(Tikhonov(psf, rho), y, LinearSolveConfig(rtol=1e-13, max_iters=1000)) ** 2).mean()

    with torch.no_grad():
        of_psf = differences(lambda p: loss(p, rhos[0]), psf)
        of_rho = differences(lambda r: loss(psf, r), rhos[0].clone())
    psf_grad, rho_grad = tikhonov_gradients(dtype)
    assert error(psf_grad, of_psf) < tolerance
    assert error(rho_grad, of_rho) < tolerance
    client.uninstall()
    psf_grad, rho_grad = tikhonov_gradients(dtype)
    assert error(psf_grad, of_psf) < 1e-3
    assert rho_grad is None


def test_an_unrolled_solve_has_the_derivative_of_its_steps():
    y, psf, rhos = data(torch.float64)
    client.install()
    few = dict(rtol=1e-13, max_iters=3)

    class Unrolled(LinearSolveConfig):
        use_analytic_grad = False

    def loss(r):
        x = dp.Variable(value=torch.zeros_like(y))
        psi, omega = ADMM.partition([dp.sum_squares(Blur(x, psf) - y), dp.norm2(Jump(x, -1))])
        solver = ADMM(psi, omega, try_diagonalize=False, linear_solve_config=Unrolled(**few))
        lams = {fn: torch.full((STEPS,), 0.3, dtype=y.dtype) for fn in psi}
        return (solver.solve(x0=y, rhos=r, lams=lams, max_iter=STEPS) ** 2).mean()

    with torch.no_grad():
        expected = differences(loss, rhos)
    rhos.requires_grad_()
    (got,) = torch.autograd.grad(loss(rhos), rhos)
    assert error(got, expected) < 1e-8


def test_second_derivatives_go_through():
    y, psf, rhos = data(torch.float64)
    client.install()

    def slope(r):
        r = r.detach().requires_grad_()
        return torch.autograd.grad(loss_of(psf, r, y)[0], r, create_graph=True)[0].sum(), r

    total, leaf = slope(rhos)
    (got,) = torch.autograd.grad(total, leaf)
    expected = differences(lambda r: slope(r)[0].detach(), rhos)
    assert error(got, expected) < 1e-7
