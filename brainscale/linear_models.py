"""Ridge and logistic regression for many weightings and many strengths at once, by Newton's method.

A probe is refitted thousands of times (inner folds × strengths × folds × repeats × permutations) on few scans, where a
library's overhead per fit outweighs the fit. Tests hold both to scikit-learn's `LogisticRegression` and `Ridge`.
"""

import numpy as np

STEPS = 100
"""Newton steps at most; a dozen are usual."""
TOLERANCE = 1e-8
"""The largest gradient at which a fit is done, in units of the summed weights."""


def ridge(x: np.ndarray, y: np.ndarray, weight: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """(F,S,D+1) coefficients, intercept last, that minimise ½‖w‖² + C Σ weight (xw + b - y)² / 2.

    x: (n,D). y: (n,). weight: (F,n), one row per fit; zero leaves a scan out. strengths: (S,) values of C.
    """
    x = np.column_stack([x, np.ones(len(x))])
    gram = np.matmul(x.T * weight[:, None, :], x)
    right = np.matmul(weight * y, x)
    penalty = np.diag([*np.ones(x.shape[1] - 1), 0.0])
    return np.linalg.solve(
        strengths[:, None, None] * gram[:, None] + penalty, (strengths[:, None] * right[:, None])[..., None]
    )[..., 0]


def logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """(F,S,D+1) coefficients, intercept last, that minimise ½‖w‖² + C Σ weight log(1 + exp(-±(xw + b))).

    x: (n,D). y: (n,) bool. weight: (F,n), one row per fit; zero leaves a scan out. strengths: (S,) values of C. Both
    classes must have weight in every fit. The objective is that of scikit-learn's `LogisticRegression(C=C)`.

    Newton's method with halved steps where the loss would rise (Boyd & Vandenberghe 2004, §9.5); fits that are done are
    left out of later steps.
    """
    x = np.column_stack([x, np.ones(len(x))])
    scaled = (strengths[:, None] * weight[:, None]).reshape(-1, len(x))
    coefficients = np.zeros((len(scaled), x.shape[1]))
    penalty = np.array([*np.ones(x.shape[1] - 1), 0.0])
    active = np.arange(len(scaled))
    for _ in range(STEPS):
        w, b = scaled[active], coefficients[active]
        probability = 1 / (1 + np.exp(-np.clip(b @ x.T, -500, 500)))
        gradient = (w * (probability - y)) @ x + penalty * b
        going = np.abs(gradient).max(axis=1) > TOLERANCE * w.sum(axis=1)
        active, w, b, gradient = active[going], w[going], b[going], gradient[going]
        if not len(active):
            break
        curvature = w * (probability * (1 - probability))[going]
        hessian = np.matmul(x.T * curvature[:, None, :], x) + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        loss, size = _loss(x, y, w, b, penalty), np.ones(len(active))
        for _ in range(30):
            worse = _loss(x, y, w, b - size[:, None] * step, penalty) > loss + 1e-12 * np.abs(loss)
            if not worse.any():
                break
            size[worse] /= 2
        coefficients[active] = b - size[:, None] * step
    return coefficients.reshape(len(weight), len(strengths), -1)


def _loss(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    return (w * np.logaddexp(0, np.where(y, -1, 1) * (b @ x.T))).sum(axis=1) + (penalty * b**2).sum(axis=1) / 2
