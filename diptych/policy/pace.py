"""How long will a step take? A linear model of a worker's own steps, fitted while it runs.

seconds = a + b * (new tokens) + c * (context tokens read), by recursive least squares with forgetting (Ljung,
*System Identification*, 2nd ed., section 11.2). Not responsible for using it: `batching.py` cuts batches with it.
"""

FORGETTING = 0.98
SCALE = (1.0, 1e-2, 1e-4)  # brings the three features to about one, so that one prior suits all
PRIOR = 1e4  # variance of the coefficients before anything was seen
MIN_STEPS = 8  # below this the model only knows the largest seconds per token so far


class StepTimes:
    """Predicts the duration of a step from its size; learns from each one that is done."""

    def __init__(self) -> None:
        self.num_seen = 0
        self._theta = [0.0, 0.0, 0.0]
        self._cov = [[PRIOR if i == j else 0.0 for j in range(3)] for i in range(3)]
        self._worst = 0.0  # seconds per new token, before the fit can be trusted
        self._bias = 1.0  # how much longer steps take than predicted, smoothed; never below one

    def observe(self, num_new: int, context: int, elapsed_s: float) -> None:
        """A step of `num_new` tokens that read `context` tokens of KV took `elapsed_s` seconds."""
        if self.num_seen >= MIN_STEPS:
            ratio = elapsed_s / max(self.predict(num_new, context) / self._bias, 1e-9)
            self._bias = max(1.0, 0.95 * self._bias + 0.05 * min(ratio, 3.0))
        self.num_seen += 1
        self._worst = max(self._worst, elapsed_s / max(num_new, 1))
        self._learn([SCALE[0], num_new * SCALE[1], context * SCALE[2]], elapsed_s)

    def predict(self, num_new: int, context: int) -> float:
        """Seconds such a step should take."""
        if self.num_seen < MIN_STEPS:
            return self._worst * num_new
        a, b, c = (max(t, 0.0) for t in self._theta)
        return self._bias * (a * SCALE[0] + b * num_new * SCALE[1] + c * context * SCALE[2])

    def room(self, budget_s: float, num_new: int, context: int) -> int:
        """How many more new tokens fit into `budget_s` beside a step of that size (may be negative)."""
        per_token = self.predict(num_new + 1, context + 1) - self.predict(num_new, context)
        spare = budget_s - self.predict(num_new, context)
        return int(spare / per_token) if per_token > 1e-12 else (1 << 30 if spare > 0 else -1)

    def _learn(self, x: list[float], y: float) -> None:
        cov = self._cov
        px = [sum(row[j] * x[j] for j in range(3)) for row in cov]
        denominator = FORGETTING + sum(x[i] * px[i] for i in range(3))
        gain = [p / denominator for p in px]
        error = y - sum(t * v for t, v in zip(self._theta, x, strict=True))
        self._theta = [t + g * error for t, g in zip(self._theta, gain, strict=True)]
        for i in range(3):
            for j in range(3):
                cov[i][j] = min(max((cov[i][j] - gain[i] * px[j]) / FORGETTING, -PRIOR), PRIOR)
