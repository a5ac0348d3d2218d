"""The defaults of each script, written down a second time from their sources, so that none changes by an oversight.

Sources, as the fact sheets of development machines (../shared/facts) name them: MFQL's paper (its tables 6 and 7) and
its authors' code; OFQL's paper, its author's sibling code InsQL, CleanDiffuser and official diffusion Q-learning; for
SOM the code that the authors' earlier work and the third-party implementation use. "ours" is what no source has.
"""
import dataclasses
import importlib
import shutil

import pytest

SIZES = dict(policy_width=256, policy_depth=3)  # in all three papers' code
EXPERIMENT = dict(  # ours, the same in every script
    dataset_path=None, seed=1, cuda=True, compile=False, cuda_graph=True, torch_deterministic=True, track=False,
    capture_video=False, runs_dir="runs", run_name=None, log_interval=1000, eval_interval=50_000,
    eval_episodes=50, checkpoint_interval=10_000, resume=None, evaluate=None)
MFQL = dict(
    SIZES, critic_width=512, critic_depth=4,  # authors' code: four layers of 512
    batch_size=256, gamma=0.99, tau=0.005,  # paper, table 6, and authors' code
    offline_steps=1_000_000,  # authors' code
    num_candidates=5, num_candidates_eval=None, num_candidates_target=None,  # authors' code: 5, in the target as well
    q_aggregation="mean", bound_weight=1.0, alpha_schedule="adaptive",  # authors' code
    actor_learning_rate=1e-4, critic_learning_rate=3e-4,  # authors' code (the paper has 1e-4 for the critic)
    observation_normalization="dataset",  # authors' code, on by default
    reward_scale=1.0, reward_shift=0.0,  # the task's own
    alpha=1.0, time_steps=50, normalize_q_loss=True)  # ours: a scale-free Q term; T is the paper's most frequent
DEFAULTS = {
    "mfql_offline": MFQL,
    "mfql_offline_to_online": dict(
        MFQL, online_steps=1_000_000, utd=1.0, buffer_size=2_000_000, balanced_sampling=False,  # authors' code
        exploration_noise=0.0, online_actor_learning_rate=None, online_alpha=None,  # authors' code: as offline ends
        from_checkpoint=None, online_alpha_steps=1),  # ours
    "ofql_offline": dict(
        SIZES, critic_width=256, critic_depth=3,  # paper, appendix B
        batch_size=256, gamma=0.99, learning_rate=3e-4, flow_ratio=0.5, time_sampling="logit-normal",  # paper
        offline_steps=1_000_000,  # paper: AntMaze and Kitchen
        tau=0.005, target_interval=1, learning_rate_schedule="constant",  # official diffusion Q-learning
        ema_rate=0.005, ema_start=1000,  # all three code bases
        num_candidates=50, inverse_temperature=50.0, noise_temperature=0.5, acting_policy="ema",  # CleanDiffuser
        target_policy="online", critic_form="layer_norm", observation_normalization="dataset",  # InsQL
        weight_decay=0.0, max_grad_norm=None,  # the paper's Adam; InsQL and CleanDiffuser: no clipping
        max_q_backup=False,  # paper: on AntMaze only
        reward_normalization="none", reward_scale=1.0, reward_shift=0.0,  # the task's own
        eta=0.1),  # of the paper's grid .001, .01, .1, .3, .5
    "som_online": dict(
        SIZES, critic_width=256, critic_depth=3,  # authors' earlier code (NC-LQL), as RELAX
        batch_size=256, gamma=0.99, num_envs=5, utd=0.2, reward_scale=0.2, buffer_size=1_000_000,  # the same two
        total_timesteps=1_000_000, learning_rate=3e-4, num_candidates=32, num_candidates_eval=None,  # RELAX
        num_proposals=100, flow_ratio=0.25,  # third-party implementation
        learning_starts=10_000, tau=0.02, alpha=100.0, path="linear", score="posterior", score_scale=None,  # ours
        q_normalization="spread", adaptive_power=0.0, num_candidates_target=1,  # ours
        exploration_noise=0.0),  # NC-LQL: none
}
BUNDLED, ONLINE = "meanflow/hopper/medium-replay-v0", "InvertedDoublePendulum-v4"
ENV_ID = dict.fromkeys(DEFAULTS, BUNDLED) | dict(som_online=ONLINE)


@pytest.fixture(autouse=True)
def no_run_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def changed(script, env_id):
    """What a run on this task takes other values of than the class has, as the flags' parser gives it."""
    m = importlib.import_module(script)
    args, plain = (dataclasses.asdict(x) for x in (m.parse_args(["--env-id", env_id])[0], m.Args()))
    return {name: value for name, value in args.items() if name != "env_id" and value != plain[name]}


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults(script):
    expected = EXPERIMENT | DEFAULTS[script] | dict(env_id=ENV_ID[script])
    if script == "som_online":
        del expected["dataset_path"]
    assert dataclasses.asdict(importlib.import_module(script).Args()) == expected


# ---------------------------------------------------------------- MFQL
MFQL_LOCOMOTION = dict(  # ours: the paper has no locomotion
    alpha=5.0, alpha_schedule="constant", gamma=0.995, tau=0.02, reward_scale=0.1, q_aggregation="min",
    num_candidates_target=1)
MFQL_TASKS = {  # paper, table 7: alpha, N, T, and gamma of the reproduction whose logs are public
    "antmaze-umaze-v2": (100, 5, 10_000, 0.99),
    "antmaze-umaze-diverse-v2": (130, 5, 100, 0.99),
    "antmaze-medium-play-v2": (10, 5, 50, 0.99),
    "antmaze-medium-diverse-v2": (50, 5, 50, 0.99),
    "antmaze-large-play-v2": (10, 5, 100, 0.99),
    "antmaze-large-diverse-v2": (10, 5, 100, 0.99),  # not in the table: as play
    "pen-cloned-v1": (10_000, 5, 100, 0.99),
    "door-cloned-v1": (9_000, 5, 50, 0.99),
    "hammer-cloned-v1": (11_000, 5, 100, 0.99),
    "relocate-cloned-v1": (10_000, 5, 50, 0.99),
    "pen-human-v1": (10_000, 5, 100, 0.99),  # human and expert: not in the table, as cloned
    "door-expert-v1": (9_000, 5, 50, 0.99),
    "hammer-human-v1": (11_000, 5, 100, 0.99),
    "relocate-expert-v1": (10_000, 5, 50, 0.99),
    "humanoidmaze-medium-navigate-singletask-task1-v0": (150, 5, 50, 0.995),
    "humanoidmaze-large-navigate-singletask-task1-v0": (10_000, 5, 50, 0.995),
    "cube-double-play-singletask-task2-v0": (120, 5, 50, 0.995),
    "antmaze-giant-navigate-singletask-v0": (10, 1, 50, 0.995),  # alpha and gamma: FQL's
    "antsoccer-arena-navigate-singletask-task1-v0": (10, 10, 50, 0.995),  # alpha and gamma: FQL's
}


@pytest.mark.parametrize("script", ["mfql_offline", "mfql_offline_to_online"])
@pytest.mark.parametrize("env_id", MFQL_TASKS)
def test_mfql_on_the_papers_tasks(script, env_id):
    """Q is not normalised, since alpha weighs against it; 500,000 steps on D4RL (appendix D) and a million on OGBench,
    and offline to online a million on both (table 2); AntMaze's reward is r - 1 (authors' code)."""
    alpha, num_candidates, time_steps, gamma = MFQL_TASKS[env_id]
    ogbench = "singletask" in env_id
    found = dataclasses.asdict(importlib.import_module(script).parse_args(["--env-id", env_id])[0])
    expected = MFQL | dict(
        alpha=alpha, num_candidates=num_candidates, time_steps=time_steps, gamma=gamma, normalize_q_loss=False,
        reward_shift=-1.0 if "antmaze" in env_id and not ogbench else 0.0,
        offline_steps=500_000 if script == "mfql_offline" and not ogbench else 1_000_000)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("env_id", ["hopper-medium-v2", "halfcheetah-medium-replay-v2", "walker2d-expert-v2",
                                    "ant-random-v2", "Hopper-v5", "mujoco/hopper/medium-v0", "Walker2d-v4"])
@pytest.mark.parametrize("script", ["mfql_offline", "mfql_offline_to_online"])
def test_mfql_on_locomotion(script, env_id):
    assert changed(script, env_id) == dict(MFQL_LOCOMOTION, alpha=2.0 if "halfcheetah" in env_id else 5.0)


def test_mfql_on_the_bundled_data():
    """Ours."""
    small = dict(MFQL_LOCOMOTION, actor_learning_rate=3e-4, eval_episodes=20, checkpoint_interval=1_000,
                 policy_width=64, policy_depth=2, critic_width=256, critic_depth=2)
    small |= dict(compile=True) if shutil.which("g++") else {}
    assert changed("mfql_offline", BUNDLED) == dict(small, offline_steps=15_000, eval_interval=3_000)
    assert changed("mfql_offline_to_online", BUNDLED) == dict(small, offline_steps=10_000, eval_interval=5_000,
                                                              online_steps=15_000)


# ---------------------------------------------------------------- OFQL
OFQL_LOCOMOTION = dict(  # InsQL: nearly a copy of the critic every fifth step, cosine, noise as it is; the rest ours
    tau=0.995, target_interval=5, learning_rate_schedule="cosine", noise_temperature=1.0,
    gamma=0.995, reward_scale=0.1, inverse_temperature=30.0)
CHEETAH = dict(OFQL_LOCOMOTION, tau=0.01, eta=2.0, inverse_temperature=1.0, offline_steps=2_000_000)  # ours
del CHEETAH["target_interval"], CHEETAH["gamma"]  # as the class has them
OFQL_PAPER = dict(  # the text: moving average in the target, plain critic; InsQL: the rest
    target_policy="ema", critic_form="plain", tau=0.995, target_interval=5, learning_rate_schedule="cosine",
    weight_decay=0.01)
MUJOCO = dict(OFQL_PAPER, offline_steps=2_000_000)  # the paper: two million on MuJoCo
ANTMAZE = dict(OFQL_PAPER, reward_scale=4.0, reward_shift=-2.0, max_q_backup=True)  # the paper: 4 (r - 0.5)
UMAZE = dict(ANTMAZE, inverse_temperature=10, eta=0.01)
del UMAZE["max_q_backup"]  # official: no backup on umaze
OFQL_TASKS = {
    # CleanDiffuser's w (50 is the class's), InsQL's eta in the paper's grid (0.1 is the class's)
    "halfcheetah-medium-expert-v2": MUJOCO,
    "hopper-medium-expert-v2": dict(MUJOCO, inverse_temperature=8, eta=0.01),
    "walker2d-medium-expert-v2": dict(MUJOCO, inverse_temperature=300),
    "halfcheetah-medium-v2": dict(MUJOCO, eta=0.5),
    "hopper-medium-v2": dict(MUJOCO, inverse_temperature=100, eta=0.01),
    "walker2d-medium-v2": dict(MUJOCO, inverse_temperature=300),
    "halfcheetah-medium-replay-v2": dict(MUJOCO, eta=0.5),
    "hopper-medium-replay-v2": dict(MUJOCO, inverse_temperature=100, eta=0.01),
    "walker2d-medium-replay-v2": dict(MUJOCO, inverse_temperature=300, eta=0.01),
    "antmaze-medium-play-v2": dict(ANTMAZE, inverse_temperature=10, eta=0.01),
    "antmaze-medium-diverse-v2": dict(ANTMAZE, inverse_temperature=5, eta=0.001),
    "antmaze-large-play-v2": dict(ANTMAZE, inverse_temperature=5, eta=0.3),
    "antmaze-large-diverse-v2": dict(ANTMAZE, inverse_temperature=10, eta=0.3),
    "antmaze-umaze-v2": UMAZE,
    "antmaze-umaze-diverse-v2": UMAZE,
    # CleanDiffuser's w, official diffusion Q-learning's eta .005 in the paper's grid
    "kitchen-partial-v0": dict(OFQL_PAPER, inverse_temperature=3, eta=0.01),
    "kitchen-mixed-v0": dict(OFQL_PAPER, inverse_temperature=3, eta=0.01),
    "kitchen-complete-v0": dict(OFQL_PAPER, inverse_temperature=3, eta=0.01),
    # official diffusion Q-learning: standardised rewards, eta .1 (human .15); w 50 is the class's
    "pen-human-v1": dict(OFQL_PAPER, reward_normalization="standardize"),
    "pen-cloned-v1": dict(OFQL_PAPER, reward_normalization="standardize"),
    **{name: dict(OFQL_LOCOMOTION, offline_steps=2_000_000)
       for name in ("hopper-random-v2", "walker2d-expert-v2", "Walker2d-v4", "mujoco/ant/expert-v0")},
    **dict.fromkeys(("halfcheetah-random-v2", "HalfCheetah-v5", "mujoco/halfcheetah/medium-v0"), CHEETAH),
    BUNDLED: dict(OFQL_LOCOMOTION, offline_steps=20_000, eval_episodes=20, eval_interval=4_000, policy_width=128,
                  checkpoint_interval=1_000,
                  critic_width=128, **(dict(compile=True) if shutil.which("g++") else {})),
}


@pytest.mark.parametrize("env_id", OFQL_TASKS)
def test_ofql_on_its_tasks(env_id):
    assert changed("ofql_offline", env_id) == OFQL_TASKS[env_id]


# ---------------------------------------------------------------- SOM and the rest
def test_som_on_its_default_task():
    """Ours: sizes for two CPU cores."""
    assert changed("som_online", ONLINE) == dict(
        total_timesteps=100_000, learning_starts=5_000, eval_interval=10_000, eval_episodes=20, batch_size=128,
        num_proposals=16, policy_width=128, policy_depth=2, critic_width=128, critic_depth=2,
        checkpoint_interval=1_000, **(dict(compile=True) if shutil.which("g++") else {}))


@pytest.mark.parametrize("script", DEFAULTS)
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "door-v1", "my_hopper-v2", "pen-human-v0", "Humanoid-v5"])
def test_other_tasks_have_the_defaults_of_the_class(script, env_id):
    assert changed(script, env_id) == {}


NUMBERS = dict(  # which no flag changes
    mfql_offline=dict(UPDATES_PER_REPLAY=10), mfql_offline_to_online=dict(UPDATES_PER_REPLAY=10),
    # all three code bases: moving average every five steps, ten actions for the backup
    ofql_offline=dict(UPDATES_PER_REPLAY=10, EMA_INTERVAL=5, MAX_Q_ACTIONS=10),
    som_online=dict(BETA_MIN=0.1, BETA_MAX=20.0))  # third-party implementation, of the paper's table 3


@pytest.mark.parametrize("script", NUMBERS)
def test_numbers_that_are_no_flags(script):
    m = importlib.import_module(script)
    assert {name: getattr(m, name) for name in NUMBERS[script]} == NUMBERS[script]


D4RL = {  # d4rl/infos.py and its environments: returns of a random and of an expert policy
    "hopper": ("Hopper-v4", -20.272305, 3234.3), "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3), "ant": ("Ant-v4", -325.6, 3879.7)}


@pytest.mark.parametrize("script", ["mfql_offline", "ofql_offline", "mfql_offline_to_online"])
def test_d4rls_references(script):
    tasks = importlib.import_module(script).D4RL
    assert {name: (task["env_id"], *task["reference"]) for name, task in tasks.items()} == D4RL
    assert [name for name, task in tasks.items() if task["kwargs"]] == ["ant"]
