"""TD3+BC (d3rlpy's) on the data, evaluation episodes and run folders of the offline scripts, for comparison.

Paper: Fujimoto, Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021, arXiv 2106.06860. Its
values throughout: alpha 2.5, 2 x 256 units, batches of 256, learning rates 3e-4, observations normalised with 1e-3
added to the deviation, the actor and the targets updated every second step. The mean action is the only candidate, so
eval/ and the final eval_n1/ are the same.
Resuming continues bit for bit; SIGINT, SIGTERM and SIGHUP save first, SIGKILL costs up to --checkpoint-interval steps.
"""
import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import common  # noqa: E402
import offline  # noqa: E402

STEM = pathlib.Path(__file__).stem


@dataclass
class Args(offline.Args):
    alpha: float = 2.5
    """weight of the normalised Q term against the cloning loss: smaller stays closer to the data"""
    learning_rate: float = 3e-4
    """Adam step size of the actor and the critics"""


def create(d3rlpy, args, device):
    width = d3rlpy.models.VectorEncoderFactory([args.hidden_width] * 2)
    return d3rlpy.algos.TD3PlusBCConfig(
        actor_learning_rate=args.learning_rate, critic_learning_rate=args.learning_rate, batch_size=args.batch_size,
        actor_encoder_factory=width, critic_encoder_factory=width, gamma=args.gamma, tau=args.tau, alpha=args.alpha,
    ).create(device)


def main(argv=None):
    return offline.main(STEM, __doc__, Args(), create, argv, epsilon=1e-3)


if __name__ == "__main__":
    common.call(main, STEM)
