"""Who is asked to take part in a round."""

from fedsim.sampling.oort import Oort
from fedsim.sampling.population import Population
from fedsim.sampling.rules import PowerOfChoice, RoundRobin, Sampler, Staying, Uniform, Weighted

__all__ = ["Oort", "Population", "PowerOfChoice", "RoundRobin", "Sampler", "Staying", "Uniform", "Weighted"]
