"""D4RL's AntMaze, kitchen and Adroit as `data/d4rl_tasks.py` rebuilds them, against what is known of D4RL's; OGBench.

Maps, limits, formulas and numbers are typed anew here, or computed in another way than the module does. No network.
"""
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import data.d4rl_tasks

ROOT = pathlib.Path(__file__).parents[1]
PARITY = ROOT.parent / "shared" / "parity"  # on development machines only
ANT_XML = pathlib.Path(gym.__file__).parent / "envs/mujoco/assets/ant.xml"
MAZES = {  # task: cells with walls, cell rows and columns, xy of the goal cell, steps
    "antmaze-umaze-v2": (18, (5, 5), (0, 8), 700), "antmaze-umaze-diverse-v2": (18, (5, 5), (0, 8), 700),
    "antmaze-medium-play-v2": (38, (8, 8), (20, 20), 1000), "antmaze-medium-diverse-v2": (38, (8, 8), (20, 20), 1000),
    "antmaze-large-play-v2": (62, (9, 12), (32, 24), 1000), "antmaze-large-diverse-v2": (62, (9, 12), (32, 24), 1000),
}
INNER_WALLS = {  # xy of their centres, m
    "umaze": {(0, 4), (4, 4)},
    "medium": {(8, 0), (12, 0), (8, 4), (0, 8), (16, 8), (20, 8), (8, 12), (4, 16), (16, 16), (12, 20)},
    "large": {(16, 0), (4, 4), (8, 4), (16, 4), (24, 4), (32, 4), (24, 8), (4, 12), (8, 12), (12, 12), (16, 12),
              (24, 12), (28, 12), (32, 12), (8, 16), (16, 16), (0, 20), (8, 20), (16, 20), (24, 20), (32, 20),
              (36, 20), (8, 24), (24, 24)},
}
LEGS = [f"{part}_{leg}" for leg in (1, 2, 3, 4) for part in ("hip", "ankle")]
pytestmark = pytest.mark.filterwarnings("ignore")


def make(env_id, **kwargs):
    if "-singletask" in env_id:
        pytest.importorskip("ogbench")
    elif env_id.split("-")[0] != "antmaze":
        pytest.importorskip("gymnasium_robotics")
    return gym.make(f"data.d4rl_tasks:{env_id}", **kwargs)


def references(env_id):
    return gym.spec(env_id).kwargs["ref_min_score"], gym.spec(env_id).kwargs["ref_max_score"]


def walls(env):
    """xy of the centres of all boxes."""
    model = env.unwrapped.model
    boxes = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    assert (model.geom_size[boxes] == [2, 2, 1]).all() and (model.geom_pos[boxes, 2] == 1).all()
    assert (model.geom_contype[boxes] == 1).all() and (model.geom_conaffinity[boxes] == 1).all()
    return {tuple(map(int, xy)) for xy in model.geom_pos[boxes, :2]}


# ---------------------------------------------------------------- AntMaze
@pytest.mark.parametrize("env_id", MAZES)
def test_maze_geometry_limits_and_scores(env_id):
    count, (rows, columns), goal, steps = MAZES[env_id]
    env = make(env_id)
    found = walls(env)
    assert len(found) == count and (env.unwrapped.goal_cell == goal).all()
    border = {(4 * x, 4 * y) for x in range(-1, columns - 1) for y in range(-1, rows - 1)
              if x in (-1, columns - 2) or y in (-1, rows - 2)}
    assert border < found and (0, 0) not in found and goal not in found
    assert found - border == INNER_WALLS[env_id.split("-")[1]]  # neither mirrored nor transposed
    assert env.spec.max_episode_steps == steps and env.observation_space.shape == (29,)
    assert env.action_space == gym.spaces.Box(-1, 1, (8,), np.float32)
    assert references(env_id) == (0, 1)


def test_start_and_goal_noise():
    env = make("antmaze-medium-play-v2")
    starts, goals = [], []
    for seed in range(400):
        starts.append(env.reset(seed=seed)[0])
        goals.append(env.unwrapped.goal - [20, 20])
    starts, goals = np.array(starts), np.array(goals)
    assert goals.min() >= 0 and goals.max() <= 1.5 and goals.min() < 0.1 and goals.max() > 1.35  # one-sided
    np.testing.assert_allclose(goals.mean(0), 0.75, atol=0.06)
    np.testing.assert_allclose(goals.std(0), np.sqrt((1 + 0.25) / 12), atol=0.04)  # of U(0, 1) + U(0, 0.5)
    plain = starts[:, [0, 1, 2, *range(7, 15)]] - [0, 0, 0.75, *[0] * 8]
    assert np.abs(plain).max() <= 0.1
    np.testing.assert_allclose(plain.mean(0), 0, atol=0.012)
    np.testing.assert_allclose(plain.std(0), 0.1 / np.sqrt(3), atol=0.006)
    np.testing.assert_allclose(np.linalg.norm(starts[:, 3:7], axis=1), 1)  # MuJoCo 2 normalised it in place
    assert 0.04 < starts[:, 4:7].std() < 0.07
    np.testing.assert_allclose(starts[:, 15:].std(0), 0.1, atol=0.015)
    assert np.abs(starts[:, 15:]).max() > 0.3  # Gaussian, not uniform


def test_seeds_repeat_and_goals_are_drawn_anew():
    env, other = make("antmaze-umaze-v2"), make("antmaze-umaze-diverse-v2")
    draw, runs = np.random.default_rng(0), []
    actions = draw.uniform(-1, 1, (20, 8)).astype(np.float32)
    for task in (env, other, env):
        task.reset(seed=7)
        runs.append((task.unwrapped.goal.copy(), [task.step(action)[0] for action in actions]))
    for goal, observations in runs[1:]:
        np.testing.assert_array_equal(goal, runs[0][0])
        np.testing.assert_array_equal(observations, runs[0][1])
    again = [(env.reset()[0], env.unwrapped.goal.copy()) for _ in range(2)]
    assert (again[0][1] != again[1][1]).all() and (again[0][0] != again[1][0]).any()


@pytest.mark.parametrize("distance, success", [(0.0, True), (0.499, True), (0.501, False), (0.8, False)])
@pytest.mark.parametrize("direction", [(1, 0), (-0.6, 0.8)])
def test_success_radius_reward_and_termination(distance, success, direction):
    env = make("antmaze-umaze-v2")
    env.reset(seed=1)
    there = env.step(np.zeros(8, np.float32))[0][:2]
    env.reset(seed=1)
    env.unwrapped.goal = there + distance * np.array(direction)
    observation, reward, terminated, truncated, info = env.step(np.zeros(8, np.float32))
    np.testing.assert_array_equal(observation[:2], there)
    assert (reward, terminated, truncated, info["success"]) == (float(success), success, False, success)


@pytest.mark.parametrize("env_id", ["antmaze-umaze-v2", "antmaze-large-play-v2"])
def test_time_limit_and_no_end_at_a_fall(env_id):
    env = make(env_id)
    env.reset(seed=0)
    env.unwrapped.data.qpos[3:7] = 0, 1, 0, 0  # on its back: Gymnasium's ant would be done
    env.unwrapped.data.qpos[2] = 0.1
    for step in range(1, MAZES[env_id][3] + 1):
        _, reward, terminated, truncated, info = env.step(np.zeros(8, np.float32))
        assert (reward, terminated, truncated, info["success"]) == (0, False, step == MAZES[env_id][3], False)


def test_observation_order_and_step():
    env = make("antmaze-umaze-v2")
    env.reset(seed=0)
    model, data = env.unwrapped.model, env.unwrapped.data
    observation = env.step(np.full(8, 5, np.float32))[0]
    np.testing.assert_array_equal(observation, [*data.qpos, *data.qvel])
    assert [model.joint(i).name for i in range(9)] == ["root", *LEGS]
    assert [model.actuator(i).name or model.joint(model.actuator_trnid[i, 0]).name for i in range(8)] == (
        LEGS[6:] + LEGS[:6])  # leg 4 first
    np.testing.assert_allclose(data.qfrc_actuator[6:], 30)  # N m; an action of 5 is clipped to 1
    assert data.time == pytest.approx(0.1) and env.metadata["render_fps"] == 10
    kept = observation.copy()
    env.step(np.zeros(8, np.float32))
    np.testing.assert_array_equal(observation, kept)  # a copy, not a view of the simulation


def d4rl_model():
    """D4RL's umaze from the XML text, with its contacts as the defaults of every geom."""
    root = xml.etree.ElementTree.parse(ANT_XML).getroot()
    root.find("option").set("timestep", "0.02")
    root.find("default/geom").attrib.update(solref=".02 1", solimp=".8 .8 .01")
    for motor in root.find("actuator"):
        motor.set("gear", "1")
        motor.set("ctrlrange", "-30 30")
    for row, cells in enumerate(("#####", "#R..#", "###.#", "#G..#", "#####")):
        for column, cell in enumerate(cells):
            if cell == "#":
                xml.etree.ElementTree.SubElement(
                    root.find("worldbody"), "geom", type="box", pos=f"{4 * column - 4} {4 * row - 4} 1", size="2 2 1",
                    contype="1", conaffinity="1")
    return mujoco.MjModel.from_xml_string(xml.etree.ElementTree.tostring(root, encoding="unicode"))


def test_physics_are_those_of_the_xml_with_d4rls_numbers():
    """Random steps after a run into a wall."""
    env, model = make("antmaze-umaze-v2"), d4rl_model()
    env.reset(seed=0)
    data, ours, draw = mujoco.MjData(model), env.unwrapped.data, np.random.default_rng(0)
    ours.qpos[0], ours.qvel[0] = -1.0, -3.0  # 1 m and 3 m/s to the next wall's face
    data.qpos[:], data.qvel[:] = ours.qpos, ours.qvel
    touched = 0
    for _ in range(100):
        action = draw.uniform(-1, 1, 8).astype(np.float32)
        observation = env.step(action)[0]
        data.ctrl[:] = 30 * action.astype(np.float64)
        for _ in range(5):
            mujoco.mj_step(model, data)
        touched += any(model.geom_type[pair].tolist().count(mujoco.mjtGeom.mjGEOM_BOX) for pair in data.contact.geom)
        np.testing.assert_allclose(observation, [*data.qpos, *data.qvel], rtol=0, atol=1e-9)
    assert touched


def test_physics_are_those_of_ogbenchs_ant():
    """OGBench's ant is D4RL's, in D4RL's frame, and its medium maze is D4RL's too."""
    ogbench = pytest.importorskip("ogbench")
    other = ogbench.make_env_and_datasets("antmaze-medium-navigate-v0", env_only=True).unwrapped
    env, draw = make("antmaze-medium-play-v2"), np.random.default_rng(0)
    boxes = other.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    assert walls(env) == {tuple(map(int, xy)) for xy in other.model.geom_pos[boxes, :2]}
    env.reset(seed=0)
    other.reset(seed=0)
    other.set_state(env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy())
    for _ in range(50):
        action = draw.uniform(-1, 1, 8).astype(np.float32)
        ours, theirs = env.step(action)[0], other.step(action)[0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_policies_trained_in_d4rls_ant_maze_reach_the_goal():
    """A few episodes; `python benchmark/antmaze_policies.py ../shared/parity` runs a hundred of each."""
    if not PARITY.exists():
        pytest.skip("the policies are not on this machine")
    spec = importlib.util.spec_from_file_location("antmaze_policies", ROOT / "benchmark" / "antmaze_policies.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    policy = benchmark.FixedPolicy(PARITY / "antmaze_umaze_10_policy.npz")
    success, _ = benchmark.returns_and_lengths(policy, "antmaze-umaze-v2", episodes=10)
    assert policy.official_success == 0.84 and success.mean() >= 0.6  # stock gymnasium-robotics: 0


def test_rendering(tmp_path):
    """In a process of its own, since MuJoCo chooses its way to draw when it is imported."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import mujoco, numpy as np
try:
    mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
except Exception as error:
    print("no way to draw:", error); sys.exit()
import gymnasium as gym
env = gym.make("data.d4rl_tasks:antmaze-large-play-v2", render_mode="rgb_array")
env.reset(seed=0)
first = env.render()
env.unwrapped.data.qpos[:2] = 32, 24
env.step(np.zeros(8, np.float32))
second = env.render()
rows, columns = np.nonzero((first != second).any(-1))
print(first.shape, first.dtype, columns.min() < 100, rows.max() > 300, columns.max() > 300, rows.min() < 200)
env.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env={**os.environ, "MUJOCO_GL": "egl"})
    if done.stdout.startswith("no way to draw"):
        pytest.skip(done.stdout)
    assert done.stdout == "(480, 480, 3) uint8 True True True True\n", done.stderr


# ---------------------------------------------------------------- kitchen
SUBTASKS = {"microwave": [22], "kettle": range(23, 30), "light switch": [17, 18], "slide cabinet": [19],
            "bottom burner": [11, 12]}
GOALS = {"microwave": [-0.75], "kettle": [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06], "light switch": [-0.69, -0.05],
         "slide cabinet": [0.37], "bottom burner": [-0.88, -0.01]}
KITCHEN = {kind: ["microwave", "kettle", "light switch", last] for kind, last in (
    ("complete", "slide cabinet"), ("partial", "slide cabinet"), ("mixed", "bottom burner"))}


@pytest.mark.parametrize("kind", KITCHEN)
def test_kitchen_observation_and_scores(kind):
    env = make(f"kitchen-{kind}-v0")
    observation, _ = env.reset(seed=0)
    goal = np.zeros(30)
    for name in KITCHEN[kind]:
        goal[SUBTASKS[name]] = GOALS[name]
    assert observation.shape == env.observation_space.shape == (60,) and env.action_space.shape == (9,)
    np.testing.assert_array_equal(observation[30:], goal)
    assert env.spec.max_episode_steps == 280 and references(f"kitchen-{kind}-v0") == (0, 4)


def test_kitchen_noise():
    """Up to a tenth of each amplitude in gymnasium-robotics' table of the robot; robot and objects independent."""
    env = make("kitchen-mixed-v0")
    env.reset(seed=0)
    robotics = pathlib.Path(importlib.import_module("gymnasium_robotics").__file__).parent
    table = xml.etree.ElementTree.parse(robotics / "envs/assets/kitchen_franka/franka_assets/franka_config.xml")
    amplitude = np.array([float(table.find(f"qpos{i}").get("pos_noise_amp")) for i in range(30)])
    noise = []
    for _ in range(150):
        observation = env.step(np.zeros(9, np.float32))[0]
        noise.append((observation[:30] - env.unwrapped.data.qpos) / (0.1 * amplitude))
    noise = np.array(noise)
    assert np.abs(noise).max() <= 1 + 1e-6 and np.abs(noise).max(0).min() > 0.9
    np.testing.assert_allclose(noise.std(0), 1 / np.sqrt(3), atol=0.1)
    assert np.diff(np.sort(noise.ravel())).min() > 1e-10  # nothing is drawn twice, as from two equal generators
    assert np.allclose(env.unwrapped.robot_env._last_robot_qpos, observation[:9])  # the controller sees the noise too


def finish(env, name):
    """Puts a subtask's objects where they should be."""
    data = env.unwrapped.data
    data.qpos[SUBTASKS[name]] = GOALS[name]
    mujoco.mj_forward(env.unwrapped.model, data)


@pytest.mark.parametrize("kind", ["partial", "mixed"])
def test_kitchen_counts_each_subtask_once_and_ends_with_the_fourth(kind):
    env = make(f"kitchen-{kind}-v0")
    for episode in range(2):  # a reset makes all four count again
        env.reset(seed=episode)
        assert env.step(np.zeros(9, np.float32))[1:4] == (0, False, False)
        for number, name in enumerate(KITCHEN[kind], 1):
            finish(env, name)
            _, reward, terminated, truncated, _ = env.step(np.zeros(9, np.float32))
            assert (reward, terminated, truncated) == (1, number == 4, False), name
            if number < 4:
                assert env.step(np.zeros(9, np.float32))[1:3] == (0, False)  # still there, not counted again


def test_kitchen_counts_no_other_subtask_and_two_at_once():
    env = make("kitchen-mixed-v0")
    env.reset(seed=0)
    finish(env, "slide cabinet")  # asked for in complete and partial only
    assert env.step(np.zeros(9, np.float32))[1] == 0
    finish(env, "microwave")
    finish(env, "kettle")
    assert env.step(np.zeros(9, np.float32))[1] == 2


def test_kitchen_rewards_what_the_returned_observation_shows():
    """As D4RL does: within 0.3 of the goal by the noisy numbers, whatever the noiseless ones are."""
    env = make("kitchen-complete-v0")
    env.reset(seed=0)
    kitchen, seen = env, []
    while type(kitchen).__name__ != "Kitchen":
        kitchen = kitchen.env
    kitchen.noise = 30 * kitchen.noise  # up to 0.3
    for _ in range(40):
        kitchen.todo = {"microwave"}
        env.unwrapped.data.qpos[22] = -0.75 + 0.3
        observation, reward, *_ = env.step(np.zeros(9, np.float32))
        assert reward == (abs(observation[22] + 0.75) < 0.3)
        seen.append(reward)
    assert 5 < sum(seen) < 35  # with the noiseless number nearly all would be alike


@pytest.mark.parametrize("distance, reward", [(0.27, 1), (0.33, 0)])
def test_kitchen_threshold(distance, reward):
    env = make("kitchen-complete-v0")
    env.reset(seed=0)
    env.unwrapped.data.qpos[22] = -0.75 + distance  # noise up to 0.01
    assert env.step(np.zeros(9, np.float32))[1] == reward


def test_kitchen_is_cut_off_at_280_steps_and_repeats_with_its_seed():
    runs = []
    for length in (280, 20):
        env, draw = make("kitchen-partial-v0"), np.random.default_rng(0)
        observations = [env.reset(seed=3)[0]]
        for step in range(1, length + 1):
            observation, reward, terminated, truncated, _ = env.step(draw.uniform(-1, 1, 9).astype(np.float32))
            observations.append(observation)
            assert (truncated, terminated) == (step == 280, False)
        runs.append(observations)
    np.testing.assert_array_equal(runs[0][:21], runs[1])


# ---------------------------------------------------------------- Adroit
@pytest.mark.parametrize("task, minimum, tolerance", [  # five episodes' standard errors: 0.2, 2, 1
    ("door", -56.512833, 1.5), ("hammer", -274.856578, 5), ("relocate", -6.425911, 3)])
def test_a_random_policys_return_is_d4rls_minimum(task, minimum, tolerance):
    """With the sign of gymnasium-robotics it would be -45.8, -266.9 and +6.4."""
    env, returns = make(f"{task}-human-v1"), []
    env.action_space.seed(0)
    for seed in range(5):
        env.reset(seed=seed)
        returns.append(0)
        for step in range(1, 201):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[-1] += reward
            assert (terminated, truncated) == (False, step == 200)
    assert np.mean(returns) == pytest.approx(minimum, abs=tolerance)


@pytest.mark.parametrize("task", ["pen", "door"])
def test_adroit_wants_the_release_that_it_repairs(monkeypatch, task):
    """In another the sign may be right already, and the repair would then be the fault."""
    pytest.importorskip("gymnasium_robotics")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.5.0")
    with pytest.raises(gym.error.Error, match="gymnasium-robotics==1.4.2 mujoco==3.11.0"):
        make(f"{task}-human-v1")


@pytest.mark.parametrize("task", ["door", "hammer", "relocate"])
def test_hand_object_term(task):
    """Twice a tenth of the distance less than gymnasium-robotics gives, with the distance from the simulation."""
    env = make(f"{task}-human-v1")
    plain = gym.make(f"AdroitHand{task.capitalize()}-v1")
    env.action_space.seed(0)
    first, other = env.reset(seed=0)[0], plain.reset(seed=0)[0]
    np.testing.assert_array_equal(first, other)
    for _ in range(30):
        action = env.action_space.sample()
        reward, other = env.step(action)[1], plain.step(action)[1]
        u = plain.unwrapped
        palm = u.data.site("S_grasp").xpos
        target = u.data.site("S_handle").xpos if task == "door" else u.data.body("Object").xpos
        assert reward == pytest.approx(other - 0.2 * np.linalg.norm(palm - target), abs=1e-9)


def test_a_dropped_pen_ends_the_episode():
    env, ends = make("pen-human-v1"), []
    env.action_space.seed(0)
    for seed in range(6):
        observation, over = env.reset(seed=seed)[0], False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            height = env.unwrapped.data.body("Object").xpos[2]
            assert observation[26] == height and terminated == (height < 0.075)
            over = terminated or truncated
        ends.append((terminated, truncated, reward))
    dropped = [reward for terminated, _, reward in ends if terminated]
    assert len(dropped) >= 4 and max(dropped) < -3  # the last step has the penalty of 5


def test_pens_limit_is_100_steps():
    env = make("pen-cloned-v1")
    for seed in range(10):
        env.reset(seed=seed)
        for step in range(1, 101):
            *_, terminated, truncated, _ = env.step(np.zeros(24, np.float32))
            assert truncated == (step == 100)
            if terminated:
                break
        if truncated:
            return
    pytest.fail("no pen stayed in a hand at rest")


@pytest.mark.parametrize("task, low, high, obs_dim, act_dim", [
    ("pen", 96.262799, 3076.8331017826877, 45, 24), ("door", -56.512833, 2880.5693087298737, 39, 28),
    ("hammer", -274.856578, 12794.134825156867, 46, 26), ("relocate", -6.425911, 4233.877797728884, 39, 30)])
def test_adroit_sizes_limits_and_scores(task, low, high, obs_dim, act_dim):
    env = make(f"{task}-human-v1")
    assert (env.observation_space.shape, env.action_space.shape) == ((obs_dim,), (act_dim,))
    assert env.spec.max_episode_steps == (100 if task == "pen" else 200)
    assert all(references(f"{task}-{kind}-v1") == (low, high) for kind in ("human", "cloned", "expert"))


# ---------------------------------------------------------------- OGBench
CUBE = "cube-single-play-singletask-task2-v0"


def test_the_papers_single_tasks_of_ogbench_have_their_data_sets_names():
    """Fifty, and the ten default tasks."""
    pytest.importorskip("ogbench")
    worlds = [f"{world}-navigate" for world in ("antmaze-large", "antmaze-giant", "humanoidmaze-medium",
                                                "humanoidmaze-large", "antsoccer-arena")]
    worlds += [f"{world}-play" for world in ("cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4")]
    for world in worlds:
        for task in ("", *(f"-task{i}" for i in range(1, 6))):
            spec = gym.spec(f"{world}-singletask{task}-v0")
            assert spec.entry_point == "data.d4rl_tasks:OGBenchTask" and spec.kwargs == {"name": spec.id}
            world_alone = world.rsplit("-", 1)[0]
            assert f"{world_alone}-singletask{task}-v0" in gym.registry  # OGBench's own name


def test_ogbench_success_is_judged_after_the_step():
    """OGBench 1.2 judges single tasks before the step unless told otherwise; the published scores are 'post'."""
    env = make(CUBE)
    assert env.unwrapped._success_timing == "post" and env.unwrapped._reward_task_id == 2
    assert env.spec.max_episode_steps == 200 and "ref_min_score" not in env.spec.kwargs


def test_starts_that_ogbench_draws_from_numpy_repeat_with_their_seed(monkeypatch):
    class Maze(gym.Env):
        observation_space = action_space = gym.spaces.Box(0, 1, (2,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.random.random(2).astype(np.float32), {}

    ogbench = pytest.importorskip("ogbench")
    monkeypatch.setattr(ogbench, "make_env_and_datasets", lambda *args, **kwargs: Maze())
    env = data.d4rl_tasks.OGBenchTask("antmaze-giant-navigate-singletask-task1-v0")
    first, again, other = (env.reset(seed=seed)[0] for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(env.reset()[0], env.reset()[0])


# ---------------------------------------------------------------- names and packages
def test_importing_needs_neither_robotics_nor_ogbench_and_works_from_anywhere(tmp_path):
    """A folder called data where the user stands does not shadow ours, and the spec names no class outside."""
    (tmp_path / "data").mkdir()
    code = f"""
import sys; sys.path[:0] = ["", {str(ROOT)!r}]
sys.modules["gymnasium_robotics"] = sys.modules["ogbench"] = None
import gymnasium as gym
print(gym.make("data.d4rl_tasks:antmaze-umaze-v2").reset(seed=0)[0].shape, gym.spec("pen-human-v1").max_episode_steps)
for name in ("door-human-v1", "kitchen-mixed-v0", {CUBE!r}):
    try:
        gym.make(name)
    except gym.error.Error as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[0] == "(29,) 100", done.stdout + done.stderr
    assert all("pip install gymnasium-robotics==1.4.2 mujoco==3.11.0" in line for line in lines[1:3])
    assert "pip install ogbench mujoco==3.11.0" in lines[3]


def test_specs_can_be_stored_and_built_again():
    """As in a Minari data set's metadata."""
    spec = gym.envs.registration.EnvSpec.from_json(gym.spec("antmaze-large-play-v2").to_json())
    assert gym.make(spec).spec.max_episode_steps == 1000 and references("antmaze-large-play-v2") == (0, 1)
