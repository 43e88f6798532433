"""A denoiser as diffusers' schedulers and pipelines call a model: model(sample, timestep, ...).sample.

B batch, C channels, L tokens, D width. sigma is the true noise-to-signal ratio, as everywhere here; abar is diffusers'
alphas_cumprod.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .conditioning import Cond
from .precond import expand_like

SIGMA_MAX = 1e5  # for infinity, where a scheduler starts from noise alone


class Output(NamedTuple):
    """What diffusers' models return: read as `.sample` or as `[0]`."""

    sample: Tensor


class DiffusersModel(nn.Module):
    """D(x, sigma) behind diffusers' calling convention, giving what `scheduler` expects a model to predict.

    Args:
        denoiser: `mmdiff.denoiser.Denoiser`, or any module (x, sigma, cond) -> x0.
        scheduler: the one that steps: with alphas_cumprod and any prediction type of diffusers (DDIM, DDPM, Euler,
            DPMSolverMultistep, UniPC, ...), or a FlowMatch one. Its own tables say which sigma a timestep is.
        in_channels, sample_size: C and (T, ...), which a pipeline reads in `config` to make its noise.

    Samples keep our layout, (B, C, T, ...), with time as axis 2. A FlowMatch scheduler's first timestep, noise alone,
    is taken at sigma 1e5. Raises ValueError for a scheduler of another kind and a timestep that is not the scheduler's.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        in_channels: int | None = None,
        sample_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        try:
            from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
        except ImportError as error:
            raise ValueError("DiffusersModel needs diffusers: pip install 'diffusers>=0.42,<0.43'") from error
        settings, name = scheduler.config, type(scheduler).__name__
        flows = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
        flow = isinstance(scheduler, flows) or settings.get("use_flow_sigmas", False)
        if not (flow or hasattr(scheduler, "alphas_cumprod")) or hasattr(scheduler, "sigmas_interpol"):
            raise ValueError(
                f"scheduler={name} is neither variance-preserving with alphas_cumprod nor a FlowMatch one; "
                "take DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler"
            )
        predicts = settings.get("prediction_type", "flow_prediction")  # a FlowMatch scheduler has no choice
        legal = ("epsilon", "sample", "flow_prediction" if flow else "v_prediction")
        if predicts not in legal:
            raise ValueError(f"prediction_type={predicts!r} of {name} is not one of {', '.join(legal)}")
        self.denoiser, self.scheduler, self.flow, self.predicts = denoiser, scheduler, flow, predicts
        self.config = SimpleNamespace(
            in_channels=in_channels, sample_size=None if sample_size is None else tuple(sample_size)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights; float32 where it has none."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Of the denoiser's weights; the CPU where it has none."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output | tuple[Tensor]:
        """The prediction at `sample` (B, C, T, ...), which went through scheduler.scale_model_input.

        timestep: () or (B,), of the scheduler. encoder_hidden_states: tokens (B, L, D), their mask (B, L) with 1 =
        attend. pooled_projections: vector (B, D).
        """
        cond = Cond(
            encoder_hidden_states,
            None if encoder_attention_mask is None else encoder_attention_mask.bool(),
            pooled_projections,
        )
        empty = cond.tokens is None and cond.vector is None
        exact = self.sigma(timestep)  # float64
        alpha = 1 / (1 + exact) if self.flow else 1 / torch.hypot(exact, torch.ones_like(exact))
        a, b = (expand_like(value.to(sample), sample) for value in (alpha, exact * alpha))
        x0 = self.denoiser(sample / a, exact.to(sample), None if empty else cond)
        if self.predicts == "sample":
            prediction = x0
        elif self.predicts == "flow_prediction":
            prediction = (sample - x0) / b  # eps - x0, for sample = (1 - b) x0 + b eps
        else:
            eps = (sample - a * x0) / b
            prediction = eps if self.predicts == "epsilon" else a * eps - b * x0
        prediction = prediction.to(sample.dtype)
        return Output(prediction) if return_dict else (prediction,)

    def sigma(self, timestep: Tensor | float) -> Tensor:
        """Noise-to-signal ratio of a timestep, () or (B,): float64 on the CPU."""
        steps = torch.as_tensor(timestep).detach().to("cpu", torch.float64)
        values = [self.ratio(step) for step in steps.flatten().tolist()]
        return torch.tensor(values, dtype=torch.float64).reshape(steps.shape)

    def ratio(self, step: float) -> float:
        """As `sigma`, of one number: from the levels that the scheduler walks where it lists them, else by index."""
        steps = torch.as_tensor(self.scheduler.timesteps).tolist()
        if getattr(self.scheduler, "sigmas", None) is not None and step in steps:
            here = getattr(self.scheduler, "step_index", None)
            # two levels may share a rounded timestep: then it is the one that the scheduler stands at
            index = here if here is not None and here < len(steps) and steps[here] == step else steps.index(step)
            level = float(self.scheduler.sigmas[index])
            return min(level / max(1 - level, 1e-12) if self.flow else level, SIGMA_MAX)
        table = self.scheduler.alphas_cumprod if not self.flow else ()
        if step != int(step) or not 0 <= step < len(table):
            raise ValueError(
                f"timestep={step:g} is none of the scheduler's: give the model the {type(self.scheduler).__name__} "
                "that steps, after its set_timesteps"
            )
        abar = float(table[int(step)])
        return min(((1 - abar) / max(abar, 1e-12)) ** 0.5, SIGMA_MAX)
