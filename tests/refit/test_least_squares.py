"""Row by row least squares: against torch.linalg.lstsq and the explicit inverse, one row a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_prune.refit.least_squares import (
    check_ridge,
    inverse_diagonals,
    ridged,
    solve_rows,
    supports,
)

WAYS = ("cheapest", "survivors", "removed")
KINDS = ("plenty", "fewer samples", "collinear", "dead inputs")


def problem(kind: str, density: float, k: int = 24, d: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Return columns (M, K), targets (M, D) and survivors (D, K)."""
    a = torch.randn(8 if kind == "fewer samples" else 200, k).double()
    if kind == "collinear":
        a[:, 1], a[:, 5] = a[:, 0], a[:, 2] + a[:, 3]
    if kind == "dead inputs":
        a[:, ::3] = 0
    keep = torch.rand(d, k) < density
    keep[1], keep[2], keep[3] = True, False, keep[4]
    return a, torch.randn(len(a), d).double(), keep


def slow_rows(a: Tensor, z: Tensor, keep: Tensor, now: Tensor, pull: float) -> Tensor:
    """Solve each row on its own: the ridge as further samples, by an orthogonal factorisation."""
    solution = torch.zeros_like(now)
    for r in range(len(keep)):
        s = keep[r].nonzero()[:, 0]
        if len(s):
            root = pull**0.5
            left = torch.cat([a[:, s], root * torch.eye(len(s)).double()])
            right = torch.cat([z[:, r], root * now[r, s]])
            solution[r, s] = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]
    return solution


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_lstsq(kind: str, density: float, way: str) -> None:
    a, z, keep = problem(kind, density)
    now = torch.randn(keep.shape).double()
    gram, pull = ridged(a.T @ a, 1e-3)
    found = solve_rows(gram, (a.T @ z).T + pull * now, keep, way=way)
    torch.testing.assert_close(found, slow_rows(a, z, keep, now, pull), rtol=1e-8, atol=1e-9)
    assert bool((found[~keep] == 0).all())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_diagonals_are_those_of_the_explicit_inverse(kind: str, density: float, way: str) -> None:
    a, _, keep = problem(kind, density)
    gram, _ = ridged(a.T @ a, 1e-3)
    expected = torch.zeros(keep.shape).double()
    for r in range(len(keep)):
        s = keep[r].nonzero()[:, 0]
        expected[r, s] = torch.linalg.inv(gram[s][:, s]).diagonal()
    found = inverse_diagonals(gram, keep, way=way)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_cost_chooses_and_does_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # With many hardly pruned rows the whole inverse is worth it, with few rows it is not.
    sizes: list[int] = []
    cholesky = torch.linalg.cholesky

    def counted(matrix: Tensor) -> Tensor:
        sizes.append(len(matrix))
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky", counted)
    a, z, keep = problem("plenty", 0.9, k=40, d=60)
    gram, _ = ridged(a.T @ a, 1e-3)
    moments = (a.T @ z).T
    for rows in (slice(None), slice(0, 2)):
        results = []
        for way in WAYS:
            sizes.clear()
            results.append(solve_rows(gram, moments[rows], keep[rows], way=way))
            if way == "cheapest":
                whole = sizes[0] == 40 and max(sizes[1:]) <= 20
                assert whole == (rows == slice(None))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-12)


def test_rows_with_the_same_survivors_are_solved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda m: calls.append(1) or cholesky(m))
    a, z, _ = problem("plenty", 0.5, d=50)
    keep = (torch.arange(24) % 2 == 0).expand(50, 24)
    solve_rows(ridged(a.T @ a, 1e-3)[0], (a.T @ z).T, keep)
    assert len(calls) == 1


def test_supports_name_every_row_once() -> None:
    keep = torch.rand(40, 3) < 0.5
    seen = []
    for support, rows in supports(keep):
        assert bool((keep[rows] == support).all())
        seen += rows.tolist()
    assert sorted(seen) == list(range(40))


def test_a_matrix_without_solution_raises() -> None:
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()
    with pytest.raises(torch.linalg.LinAlgError):
        solve_rows(gram, torch.ones(1, 2).double(), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("ridge", [0, -1.0, float("nan"), float("inf"), "much", True])
def test_a_ridge_that_is_none_is_refused(ridge: object) -> None:
    with pytest.raises(ValueError, match="Expected argument `ridge`"):
        check_ridge(ridge)
