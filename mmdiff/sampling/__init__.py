"""Samplers: from noise to data by repeated calls of a denoiser D(x, sigma) -> x0, where x = x0 + sigma * eps."""

from .adams import AdamsBashforth
from .ancestral import Ancestral
from .brownian import Brownian
from .consistency import Consistency
from .dpmpp import DPMpp2M, DPMpp2S, DPMpp3M
from .edm import Euler, Heun
from .langevin import Langevin, PredictorCorrector
from .ode import AdaptiveODE
from .rk4 import RK4
from .rolling import Rolling
from .sampler import Denoise, Noise, Sampler, Step, seeded_noise, start
from .sde import DPMpp2MSDE, DPMpp3MSDE
from .unipc import UniPC
