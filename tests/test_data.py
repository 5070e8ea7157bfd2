"""Datasets: what each family means by its flags, robomimic's and Minari's layouts, downloads, damaged files."""

import http.server
import json
import sys
import threading
import time
import warnings
from pathlib import Path

import conftest
import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, dataset, from_pypi, make_minari, one_sentence, run_forked, succeeded
from gymnasium.utils.env_checker import check_env

from vqvae import UserError, find_ends, load_arrays, make_env, make_transitions, scoring

CPU = torch.device("cpu")


def write(path, arrays):
    return conftest.write(path, arrays, compression="gzip")  # as D4RL writes its files


def without_timeouts(arrays, terminals=()):
    del arrays["timeouts"]
    arrays["terminals"][list(terminals)] = True
    return arrays


@pytest.mark.parametrize(
    ("path", "official"),
    [
        (None, True),
        ("hopper_expert-v2.hdf5", True),
        ("data/hopper_expert-v2.hdf5", True),
        ("data/my_hopper_expert-v2.hdf5", False),
        ("hopper_expert-standin.hdf5", False),
    ],
)
def test_whose_data_a_score_is_over(path, official):
    sentence = make_env("hopper-expert-v2").get_wrapper_attr("provenance")(path)
    assert ("the data are D4RL's" in sentence) == official
    assert ("do not compare" in sentence) != official


# --- Where episodes end ---


def test_without_timeouts_the_time_limit_cuts():
    arrays = without_timeouts(dataset(n=30), terminals=[4, 5, 19])
    ends = find_ends(arrays, 6)
    length, expected = 0, []
    for terminal in arrays["terminals"]:
        length += 1
        expected.append(terminal or length == 6)
        length = 0 if expected[-1] else length
    assert ends.tolist() == [*expected[:-1], True]
    assert np.flatnonzero(find_ends(arrays, None)).tolist() == [4, 5, 19, 29]


def test_which_transitions_are_kept():
    """Three episodes of 3 rows that end by a terminal, by a time limit, and by a terminal in the last row of all."""
    arrays = dataset(n=9, episode=3)
    arrays["terminals"][[2, 8]] = True
    data, returns = make_transitions(arrays, None, CPU)
    kept = [0, 1, 2, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(data.obs, arrays["observations"][kept])
    np.testing.assert_array_equal(data.terminals, [0, 0, 1, 0, 0, 0, 0, 1])
    alive = data.terminals == 0
    np.testing.assert_array_equal(data.next_obs[alive], arrays["observations"][[1, 2, 4, 5, 7, 8]])
    np.testing.assert_allclose(returns, arrays["rewards"].reshape(3, 3).sum(1), rtol=1e-6)


def test_columns_of_one_number_and_of_unequal_lengths(tmp_path):
    """D4RL reads rewards and flags of shape (N, 1) too."""
    env = make_env("kitchen-mixed-v0")
    arrays = dataset(obs_dim=60, action_dim=9)
    columns = arrays | {key: arrays[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    for key, array in load_arrays(write(tmp_path / "k.hdf5", columns), env).items():
        assert key == "episode_returns" or np.array_equal(array, arrays[key])
    for several in ({key: arrays[key][:, None].repeat(3, 1)} for key in ("rewards", "terminals", "timeouts")):
        with pytest.raises(UserError, match=r"have shape \(400, 3\), not one number a row"):
            load_arrays(write(tmp_path / "s.hdf5", arrays | several), env)
    with pytest.raises(UserError, match="different lengths"):
        load_arrays(write(tmp_path / "l.hdf5", arrays | {"rewards": arrays["rewards"][:-1]}), env)


def test_kitchen_terminals_end_demonstrations(tmp_path):
    """D4RL's files have no timeouts, a terminal at the end of each demonstration, however long, and in every step a
    reward for each task that is done then: a demonstration's return is how many were done at once."""
    env = make_env("kitchen-mixed-v0")
    arrays = without_timeouts(dataset(n=700, obs_dim=60, action_dim=9), terminals=[299, 699])
    arrays["rewards"] = np.repeat(np.float32([0, 1, 2, 0, 3]), 140)
    data, returns = make_transitions(load_arrays(write(tmp_path / "k.hdf5", arrays), env), env, CPU)
    assert len(data.obs) == 700
    assert data.terminals.sum() == 2
    assert returns.tolist() == [2, 3]
    score, _ = scoring(env, None)
    assert score(returns.mean()) == 62.5


@pytest.mark.parametrize("name", ["timeouts", "terminals"])
def test_maze2d_flags_mark_goals(tmp_path, name):
    """In D4RL's files timeouts mark the step that reached a goal, in those of its generator terminals do: in neither
    case is it the end of anything."""
    env = make_env("maze2d-umaze-v1")
    arrays = dataset(obs_dim=4, action_dim=2)
    if name == "terminals":
        arrays = without_timeouts(arrays, terminals=[99, 199, 299, 399])
    data, returns = make_transitions(load_arrays(write(tmp_path / "m.hdf5", arrays), env), env, CPU)
    assert (len(data.obs), len(returns), data.terminals.sum()) == (396, 4, 0)


@pytest.mark.usefixtures("ant")
def test_antmaze_walks_on_from_the_goal_and_jumps_only_between_episodes(tmp_path):
    env = make_env("antmaze-umaze-v0")
    arrays = dataset(n=300, obs_dim=29, action_dim=8)
    arrays["observations"][:, :2] = np.linspace(0, 1, 100)[np.arange(300) % 100, None]
    arrays["observations"][150:, :2] += 5  # a new episode that no flag marks
    arrays["terminals"][120:130] = True
    arrays["rewards"] = arrays["terminals"].astype(np.float32)
    data, returns = make_transitions(load_arrays(write(tmp_path / "a.hdf5", arrays), env), env, CPU)
    assert returns.tolist() == [0, 1, 0, 0]
    assert data.terminals.sum() == 10
    rows = [row for row in range(300) if row not in (99, 149, 199, 299)]
    np.testing.assert_array_equal(data.obs, arrays["observations"][rows])


@pytest.mark.skipif(not (SHARED_DATA / "door-human-v0.hdf5").exists(), reason="the human demonstrations are not here")
def test_door_episodes_end_by_timeouts():
    path = str(SHARED_DATA / "door-human-v0.hdf5")
    env = make_env("door-human-v0")
    data, returns = make_transitions(load_arrays(path, env), env, CPU)
    assert (len(data.obs), len(returns), data.terminals.sum()) == (6729 - 25, 25, 0)
    assert returns.mean() == pytest.approx(794.1, abs=0.1)
    assert data.actions.abs().max() == 1


@pytest.mark.skipif(not (SHARED_DATA / "door-human-v0.hdf5").exists(), reason="the human demonstrations are not here")
@pytest.mark.parametrize("script", ["saq_cql", "saq_iql", "saq_brac", "saq_bc"])
def test_all_scripts_on_door(tmp_path, script):
    options = "--env door-human-v0 --vq-steps 30 --steps 30 --eval-every 30 --eval-episodes 1 --final-episodes 2"
    data = SHARED_DATA / "door-human-v0.hdf5"
    process = run_forked(*options.split(), "--dataset-path", data, "--out", tmp_path, script=f"{script}.py")
    succeeded(process)
    assert "6704 transitions, 25 episodes, returns 230.1 to 1496.2" in process.stdout
    assert "actions leave [-1, 1], up to 1.37: clipped" in process.stdout
    result = json.loads(next(tmp_path.glob("*/result.json")).read_text())
    assert np.isfinite([result[script]["score"], result[script.removeprefix("saq_")]["score"]]).all()


# --- robomimic ---

LIFT = SHARED_DATA / "lift_ph_10demos.hdf5"
needs_lift = pytest.mark.skipif(not LIFT.exists(), reason="robomimic's demonstrations are not here")
PARTS = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]


def demonstrations(path, arms=1, next_obs=True, lengths=(5, 4)):
    """A small file in robomimic's layout. Its demonstrations are numbered so that text order is not their order."""
    rng, keys = np.random.default_rng(0), {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2, "joint_pos": 7}
    parts = {f"robot{arm}_{key}": size for arm in range(arms) for key, size in keys.items()} | {"object": 10}
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {}})
        for name, length in zip(["demo_10", "demo_2"], lengths, strict=True):
            obs = {key: rng.standard_normal((length + 1, size)) for key, size in parts.items()}
            demo = file.create_group(f"data/{name}")
            demo["actions"] = rng.uniform(-1, 1, (length, 7 * arms))
            demo["rewards"] = demo["dones"] = (np.arange(length) >= length - 2).astype(float)
            for key, values in obs.items():
                demo[f"obs/{key}"] = values[:-1]
                if next_obs:
                    demo[f"next_obs/{key}"] = values[1:]
        file["mask/better"] = np.array([b"demo_10"])
    return str(path)


def reader(arms=1):
    """offline_envs' robomimic environment without its simulation, which reading a file does not need."""
    from offline_envs import OfflineEnv
    from offline_envs.robomimic import Robomimic

    robomimic = Robomimic.__new__(Robomimic)
    robomimic.keys = [f"robot{arm}_{part}" for arm in range(arms) for part in ("eef_pos", "eef_quat", "gripper_qpos")]
    robomimic.keys.append("object")
    return OfflineEnv(robomimic, "http://x/lift/ph/low_dim_v141.hdf5", 0.0, 1.0)


@pytest.mark.parametrize(("arms", "next_obs"), [(1, True), (1, False), (2, True)])
def test_robomimic_layout(tmp_path, arms, next_obs):
    path = demonstrations(tmp_path / "low_dim_v141.hdf5", arms, next_obs)
    arrays = reader(arms).get_dataset(path)
    with h5py.File(path) as file:
        parts = [f"robot{arm}_{part}" for arm in range(arms) for part in ("eef_pos", "eef_quat", "gripper_qpos")]
        first = np.concatenate([file[f"data/demo_2/obs/{part}"] for part in [*parts, "object"]], 1)
        np.testing.assert_array_equal(arrays["observations"][:4], first)
        np.testing.assert_array_equal(arrays["actions"][4:], file["data/demo_10/actions"])
    assert arrays["observations"].shape == (9, 9 * arms + 10)
    assert arrays["terminals"].tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1]
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [3, 8]
    data, returns = make_transitions(arrays, None, CPU)
    assert returns.tolist() == [1, 1]  # success, not the number of successful steps
    assert len(data.obs) == 9
    np.testing.assert_allclose(data.next_obs[0], first[1], rtol=1e-6)


def test_robomimic_masks(tmp_path):
    path = demonstrations(tmp_path / "low_dim_v141.hdf5")
    arrays = reader().get_dataset(f"{path}:better")
    assert len(arrays["rewards"]) == 5
    with pytest.raises(ValueError, match="no mask best, but better"):
        reader().get_dataset(f"{path}:best")
    with pytest.raises(FileNotFoundError, match="low_dim_v141.hdf5:"):
        reader().get_dataset(f"{path}:")
    with pytest.raises(UserError, match="only robomimic's files have masks"):
        load_arrays(f"{write(tmp_path / 'd.hdf5', dataset())}:best", make_env("hopper-expert-v2"))


def test_robomimic_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(UserError, match="pip install -r requirements-robomimic.txt"):
        make_env("lift-ph", demonstrations(tmp_path / "lift.hdf5"))


@pytest.mark.parametrize(
    ("name", "task", "arms", "object_size"),
    [
        ("can-ph", "PickPlaceCan", 1, 14),
        ("square-mh", "NutAssemblySquare", 1, 14),
        ("tool-hang-ph", "ToolHang", 1, 44),
        ("transport-ph", "TwoArmTransport", 2, 41),
    ],
)
def test_other_robomimic_tasks(tmp_path, name, task, arms, object_size):
    """Sizes of robomimic's datasets; of transport, both arms."""
    controller = {"type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3}
    controller |= {"output_min": [-0.05] * 3 + [-0.5] * 3, "kp": 150, "damping": 1, "impedance_mode": "fixed"}
    controller |= {"kp_limits": [0, 300], "damping_limits": [0, 10], "position_limits": None, "control_delta": True}
    controller |= {"orientation_limits": None, "uncouple_pos_ori": True, "interpolation": None, "ramp_ratio": 0.2}
    kwargs = {"robots": ["Panda"] * arms, "controller_configs": controller, "control_freq": 20}
    kwargs |= {"env_configuration": "single-arm-opposed"} if arms == 2 else {}
    with h5py.File(tmp_path / "low_dim_v141.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_name": task, "env_kwargs": kwargs})
    env = make_env(name, str(tmp_path / "low_dim_v141.hdf5"))
    assert env.observation_space.shape == (9 * arms + object_size,)
    assert env.action_space.shape == (7 * arms,)
    assert env.reset(seed=0)[0].shape == env.observation_space.shape
    _, reward, terminated, _, _ = env.step(np.zeros(7 * arms, np.float32))
    assert (reward, terminated) == (0.0, False)


def test_robomimics_own_test_file(pytestconfig):
    """The file with images in robomimic 0.1.0's source archive, of which the low-dimensional part is read."""
    member = "robomimic-0.1.0/tests/assets/test.hdf5"
    arrays = reader().get_dataset(str(from_pypi("robomimic==0.1.0", member, pytestconfig)))
    assert arrays["observations"].shape == (531, 19)
    assert arrays["actions"].shape == (531, 7)
    data, returns = make_transitions(arrays, None, CPU)
    assert returns.tolist() == [1] * 10
    assert data.terminals.sum() == 51
    alive = (data.terminals[:-1] == 0).numpy()
    np.testing.assert_array_equal(data.next_obs[:-1][alive], data.obs[1:][alive])
    if LIFT.exists():
        for key, column in reader().get_dataset(str(LIFT)).items():
            np.testing.assert_array_equal(arrays[key], column)


def test_a_file_of_another_task(tmp_path):
    with pytest.raises(UserError, match="is of the task Lift, not ToolHang"):
        make_env("tool-hang-ph", demonstrations(tmp_path / "lift.hdf5"))
    with pytest.raises(UserError, match="lift-ph cannot be made: no .*object 'data' doesn't exist"):
        make_env("lift-ph", write(tmp_path / "d.hdf5", dataset()))
    with pytest.raises(UserError, match="lift-ph cannot be made") as error:
        make_env("lift-ph", str(tmp_path))
    assert "\n" not in str(error.value)


def test_incomplete_demonstrations_are_named(tmp_path):
    path = demonstrations(tmp_path / "low_dim_v141.hdf5")
    with h5py.File(path, "a") as file:
        actions = file["data/demo_2/actions"][()]
        del file["data/demo_2/actions"]
        file["data/demo_2/actions"] = actions[:-1]
    with pytest.raises(ValueError, match="demo_2 is not complete: its columns have different lengths"):
        reader().get_dataset(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_2/obs/object"]
    with pytest.raises(ValueError, match="demo_2 is not complete: .*'object' doesn't exist"):
        reader().get_dataset(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_2"], file["data/demo_10"]
    with pytest.raises(ValueError, match="it has no episodes"):
        reader().get_dataset(path)


def test_robomimic_names_and_horizons():
    gym.make("offline_envs:hopper-expert-v2")
    steps = {"lift-ph": 400, "can-ph": 400, "square-ph": 400, "tool-hang-ph": 700, "transport-ph": 700}
    steps |= {"lift-mh": 500, "can-mh": 500, "square-mh": 500, "transport-mh": 1100}
    for name, horizon in steps.items():
        assert gym.spec(name).max_episode_steps == horizon
        task, data = name.rsplit("-", 1)
        url = f"rt_benchmark/{task.replace('-', '_')}/{data}/low_dim_v141.hdf5"
        assert gym.spec(name).kwargs["dataset"].endswith(url)


@needs_lift
def test_lift_reproduces_its_demonstrations():
    """From the stored states our observations are those of the file; its actions succeed in our environment."""
    env = make_env("lift-ph", str(LIFT))
    lift, successes = env.unwrapped, 0
    read = iter(load_arrays(str(LIFT), env)["observations"])
    with h5py.File(LIFT) as file:
        for demo in file["data"].values():
            lift.reset(seed=0)
            for state, *parts in zip(demo["states"], *(demo["obs"][part][()] for part in PARTS), strict=True):
                lift.robosuite.sim.set_state_from_flattened(state)
                lift.robosuite.sim.forward()
                observed = lift.observe(lift.robosuite._get_observations(force_update=True))
                np.testing.assert_allclose(observed, np.concatenate(parts), atol=1e-6)
                np.testing.assert_array_equal(next(read), np.concatenate(parts))
            lift.robosuite.sim.set_state_from_flattened(demo["states"][0])
            lift.robosuite.sim.forward()
            successes += any(lift.step(action)[2] for action in demo["actions"][()])
    assert successes >= 9


@needs_lift
def test_lift_in_gymnasium(tmp_path):
    env = make_env("lift-ph", str(LIFT))
    first, again, other = (env.reset(seed=seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about Box bounds
        check_env(env.unwrapped, skip_render_check=True)
    options = "--env lift-ph --vq-steps 30 --steps 30 --eval-every 30 --eval-episodes 1 --final-episodes 1 --no-compare"
    process = succeeded(run_forked(*options.split(), "--dataset-path", LIFT, "--out", tmp_path, script="saq_bc.py"))
    assert "531 transitions, 10 episodes, returns 1.0 to 1.0" in process.stdout
    assert "do not compare with robomimic's" in process.stdout


# --- Minari ---


def test_a_minari_dataset_trains_and_is_scored(tmp_path):
    environment = make_minari(tmp_path / "minari", "Pendulum-v1", "tests/pendulum/random-v0", "-1500", "-150")
    options = "--env tests/pendulum/random-v0 --vq-steps 30 --steps 30 --eval-every 30 --eval-episodes 2"
    options += " --final-episodes 2 --num-codes 4 --no-compare"
    process = succeeded(run_forked(*options.split(), "--out", tmp_path / "runs", env=environment))
    assert "60 transitions, 3 episodes" in process.stdout
    assert "0 at a return of -1500, 100 at -150, by Minari's references, which are not D4RL's" in process.stdout
    result = json.loads(next((tmp_path / "runs").glob("*/result.json")).read_text())["saq_cql"]
    assert result["score"] == pytest.approx(100 * (result["return"] + 1500) / 1350)


def test_minari_observations_are_flattened_and_its_flags_kept(tmp_path, monkeypatch):
    import minari

    make_minari(tmp_path, "PointMaze_UMaze-v3", "tests/maze-v0", "nan", "nan")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = make_env("tests/maze-v0")
    arrays = load_arrays(None, env)
    episode = minari.load_dataset("tests/maze-v0")[1]
    space = minari.load_dataset("tests/maze-v0").observation_space
    for row in range(20):
        observation = {key: values[row + 1] for key, values in episode.observations.items()}
        np.testing.assert_array_equal(arrays["next_observations"][20 + row], gym.spaces.flatten(space, observation))
    assert env.observation_space.shape == (8,)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [19, 39, 59]
    data, returns = make_transitions(arrays, env, CPU)
    assert (len(data.obs), len(returns)) == (60, 3)
    score, sentence = scoring(env, None)
    assert score(3.0) == 3.0
    assert "return itself" in sentence


def test_minari_flattens_data_as_its_environment(tmp_path, monkeypatch):
    """Even where the environment's dictionary is not in the order of its keys, which is the stored one's."""
    make_minari(tmp_path, "Unsorted-v0", "tests/unsorted-v0", "nan", "nan")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = make_env("tests/unsorted-v0")
    np.testing.assert_array_equal(env.reset(seed=0)[0], [2, 2, 1])
    np.testing.assert_array_equal(load_arrays(None, env)["observations"][0], [2, 2, 1])


def test_a_minari_dataset_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("MINARI_REMOTE", "gcp://no-such-bucket")
    with pytest.raises(UserError, match="nobody/nothing-v0 cannot be made") as error:
        make_env("nobody/nothing-v0")
    assert "\n" not in str(error.value)


# --- Downloads ---


class Server(http.server.ThreadingHTTPServer):
    """A server of one file. `behaviour` says what it does next: status, cut (bytes of its next answer), length (what
    it claims), ranges (whether it serves them), stall (whether it stops sending without hanging up)."""

    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.behaviour, self.requests = body, {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked, behaviour, body = self.headers["Range"], self.server.behaviour, self.server.body
        self.server.requests.append(asked)
        status, start = behaviour.get("status", 200), 0
        if asked and behaviour.get("ranges", True) and status == 200:
            status, start = 206, int(asked.removeprefix("bytes=").removesuffix("-"))
        self.send_response(status)
        if behaviour.get("length", True):
            self.send_header("Content-Length", str(behaviour.get("length", len(body)) - start))
        self.send_header("ETag", behaviour.get("version", "1"))
        self.end_headers()
        self.wfile.write(body[start:][: behaviour.get("cut")])
        if behaviour.get("stall"):
            time.sleep(1.5)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of hopper-medium-v2; yields (server, environment, path of the cached file)."""
    env = gym.make("offline_envs:hopper-medium-v2")
    import offline_envs

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(offline_envs.datasets, "TIMEOUT", 0.5)
    write(tmp_path / "source.hdf5", dataset(obs_dim=11, action_dim=3))
    httpd = Server((tmp_path / "source.hdf5").read_bytes())
    while not isinstance(env, offline_envs.OfflineEnv):
        env = env.env
    env.dataset = f"http://127.0.0.1:{httpd.server_port}/hopper_medium-v2.hdf5"
    yield httpd, env, tmp_path / "cache" / "hopper_medium-v2.hdf5"
    httpd.shutdown()
    httpd.server_close()


def files(folder):
    return sorted(file.name for file in folder.iterdir())


def failure(env, path):
    with pytest.raises(OSError, match="could not be downloaded") as error:
        env.get_dataset()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not path.exists()
    return str(error.value)


def test_a_dataset_is_downloaded_once(server):
    httpd, env, path = server
    assert env.get_dataset()["observations"].shape == (400, 11)
    httpd.behaviour = {"status": 404}
    assert env.get_dataset()["observations"].shape == (400, 11)
    assert files(path.parent) == [path.name]


@pytest.mark.parametrize("stall", [False, True])
def test_a_download_that_breaks_goes_on_where_it_was(server, stall):
    """Every answer breaks off after 10,000 bytes: three of them are not enough, but the next call goes on."""
    httpd, env, path = server
    assert 30_000 < len(httpd.body) < 60_000
    httpd.behaviour = {"cut": 10_000, "stall": stall}
    failure(env, path)
    assert [file.stat().st_size for file in path.parent.glob("*.part")] == [30_000]
    assert env.get_dataset()["observations"].shape == (400, 11)
    assert path.read_bytes() == httpd.body
    assert files(path.parent) == [path.name]
    assert {"bytes=10000-", "bytes=20000-", "bytes=30000-"} <= set(httpd.requests)


def test_a_server_without_ranges_starts_again(server):
    httpd, env, path = server
    httpd.behaviour = {"cut": 4_000, "ranges": False}
    failure(env, path)
    httpd.behaviour = {"ranges": False}
    env.get_dataset()
    assert path.read_bytes() == httpd.body


def test_two_versions_of_a_file_are_never_joined(server):
    httpd, env, path = server
    httpd.behaviour = {"cut": 4_000}
    failure(env, path)
    write(path.with_name("second.hdf5"), dataset(obs_dim=11, action_dim=3, seed=1))
    httpd.behaviour, httpd.body = {"version": "2"}, path.with_name("second.hdf5").read_bytes()
    env.get_dataset()
    assert path.read_bytes() == httpd.body


@pytest.mark.parametrize("body", [b"<html>Sign in, please</html>", b""])
def test_a_page_in_place_of_a_file_is_not_kept(server, body):
    """A login page with status 200, or an empty answer: nothing is left that would be read the next time."""
    httpd, env, path = server
    hdf5, httpd.body = httpd.body, body
    assert "no HDF5 file" in failure(env, path)
    assert [name for name in files(path.parent) if not name.endswith(".lock")] == []
    httpd.body = hdf5
    assert env.get_dataset()["observations"].shape == (400, 11)


@pytest.mark.parametrize("folder", ["~nosuchuser/data", "~nosuchuser"])
def test_a_home_directory_that_there_is_not(monkeypatch, folder):
    monkeypatch.setenv("D4RL_DATASET_DIR", folder)
    process = run_forked("--env", "hopper-expert-v2")
    assert f"{folder} has no home directory here: set D4RL_DATASET_DIR" in one_sentence(process)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"status": 404}, "HTTP 404 Not Found"),
        ({"status": 403}, "HTTP 403 Forbidden"),
        ({"length": False}, "does not say how long"),
        ({"length": 90_000}, "of 90000 bytes arrived"),
        ({"cut": 0, "stall": True}, "timed out"),
    ],
)
def test_a_download_that_cannot_be(server, behaviour, reason):
    httpd, env, path = server
    httpd.behaviour = behaviour
    assert reason in failure(env, path)
    assert len(httpd.requests) <= 6


def test_an_unreachable_server(server):
    httpd, env, path = server
    env.dataset = "http://127.0.0.1:9/hopper_medium-v2.hdf5"
    assert "refused" in failure(env, path)


def test_a_length_that_is_too_short_is_noticed_when_reading(server):
    httpd, env, path = server
    httpd.behaviour = {"length": 20_000}
    with pytest.raises(OSError, match="is damaged .*: delete it to download it again"):
        env.get_dataset()


def test_downloads_at_the_same_time(server):
    httpd, env, path = server
    threads = [threading.Thread(target=env.get_dataset) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == httpd.body
    assert len(httpd.requests) == 1


# --- Damaged files ---


def damaged(kind, arrays, path, rng):
    """Writes `arrays` to `path` with one damage of a kind. Returns whether reading must fail."""
    keys = sorted(set(arrays) - {"timeouts"})
    key = keys[rng.integers(len(keys))]
    if kind == "key":
        del arrays[key]
    elif kind == "shape":
        array = arrays[key]
        arrays[key] = [array[:-1], array[None], array.reshape(len(array) // 2, 2, -1), array[:0]][rng.integers(4)]
    elif kind == "type":
        arrays[key] = [np.full(arrays[key].shape, b"?"), arrays[key] + 1j][rng.integers(2)]
    elif kind == "nan":
        arrays[key] = arrays[key].astype(np.float32)
        arrays[key][rng.integers(len(arrays[key]))] = [np.nan, np.inf, -np.inf, 1e30][rng.integers(4)]
    write(path, arrays) if path.suffix == ".hdf5" else np.savez_compressed(path, **arrays)
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        del content[int(len(content) * rng.uniform(0, 0.98)) :]
    elif kind == "flipped":
        for at in rng.integers(len(content), size=20):
            content[at] ^= 1 << rng.integers(8)
    path.write_bytes(content)
    return kind != "flipped"


def test_200_damaged_files(tmp_path):
    """Each is refused in one sentence. Flipped bytes may also miss everything that is read."""
    sentences, rng = [], np.random.default_rng(0)
    whole, whole_returns = make_transitions(dataset(), None, CPU)
    for i in range(200):
        kind = ["truncated", "flipped", "key", "shape", "type", "nan"][i % 6]
        path = tmp_path / f"d{i}{['.hdf5', '.npz'][i // 6 % 2]}"
        must_fail = damaged(kind, dataset(), path, rng)
        try:
            data, returns = make_transitions(load_arrays(str(path), None), None, CPU)
        except UserError as error:
            sentences.append(str(error))
        else:
            assert not must_fail, (i, kind, path.suffix)
            assert np.array_equal(returns, whole_returns), (i, kind, path.suffix)
            assert all(torch.equal(*columns) for columns in zip(data, whole, strict=True)), (i, kind, path.suffix)
    assert len(sentences) > 180
    assert all("\n" not in sentence and len(sentence) < 500 for sentence in sentences)


def test_a_damaged_file_ends_a_script(tmp_path):
    path = tmp_path / "d.hdf5"
    damaged("flipped", dataset(), path, np.random.default_rng(2))
    one_sentence(run_forked("--env", "Pendulum-v1", "--dataset-path", path, "--out", tmp_path / "runs"))
    assert not Path(tmp_path / "runs").exists()
