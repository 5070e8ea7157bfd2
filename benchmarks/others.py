"""The updates of other implementations, at the sizes of speed.py, where they can be imported.

`d3rlpy`: pip install d3rlpy. `saq_official`, `fql_official`: checkouts of jianlanluo/SAQ and seohongpark/fql, with jax,
flax, optax, distrax and ml_collections installed. `corl`: a checkout of tinkoff-ai/CORL. Each function returns {update:
function that takes one gradient step}. What only their command lines need (gym, D4RL, trackers) is left out: nothing
here runs it.
"""

import importlib.util
import itertools
import sys
from unittest.mock import MagicMock

import numpy as np

BATCH, ROWS = 256, 10_000


def leave_out(*modules):
    """Lets `import NAME` succeed where a package that a file imports, and no update needs, is not there."""
    for name in modules:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = MagicMock()


def random_data(obs_dim, action_dim):
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((ROWS, obs_dim), np.float32),
        "actions": rng.uniform(-1, 1, (ROWS, action_dim)).astype(np.float32),
        "rewards": rng.random(ROWS, np.float32),
        "next_observations": rng.standard_normal((ROWS, obs_dim), np.float32),
        "dones": np.zeros(ROWS, np.float32),
    }


def d3rlpy_updates(obs_dim, action_dim, num_codes, device):
    import d3rlpy

    data, rng = random_data(obs_dim, action_dim), np.random.default_rng(0)
    encoder = {512: d3rlpy.models.VectorEncoderFactory([512, 512]), 256: d3rlpy.models.VectorEncoderFactory([256, 256])}
    kinds = {"saq_cql": d3rlpy.ActionSpace.DISCRETE, "cql": d3rlpy.ActionSpace.CONTINUOUS}
    updates = {}
    for update, kind in kinds.items():
        if update == "saq_cql":
            actions = rng.integers(num_codes, size=(ROWS, 1))
            config = d3rlpy.algos.DiscreteCQLConfig(batch_size=BATCH, encoder_factory=encoder[512])
        else:
            actions = data["actions"]
            factories = {"actor_encoder_factory": encoder[256], "critic_encoder_factory": encoder[256]}
            config = d3rlpy.algos.CQLConfig(batch_size=BATCH, **factories)
        timeouts, rewards = (np.arange(ROWS) % 1000 == 999).astype(np.float32), data["rewards"][:, None]
        columns = (data["observations"], actions, rewards, data["dones"], timeouts)
        dataset = d3rlpy.dataset.MDPDataset(*columns, action_space=kind)
        algo = config.create(device=f"{device.type}:0")
        algo.build_with_dataset(dataset)
        updates[update] = lambda algo=algo, dataset=dataset: algo.update(dataset.sample_transition_batch(BATCH))
    return updates


def saq_official_updates(folder, obs_dim, action_dim, num_codes):
    """The authors' quantizer, SAQ-CQL and continuous CQL; a batch is drawn in each step, as their loops do it."""
    sys.path.insert(0, str(folder))
    leave_out("gym", "d4rl", "wandb", "cloudpickle", "robomimic")
    import jax
    from vqn.conservative_sac import ConservativeSAC
    from vqn.jax_utils import init_rng
    from vqn.model import FullyConnectedQFunction, TanhGaussianPolicy
    from vqn.vqn import VQN

    init_rng(0)
    data, rng = random_data(obs_dim, action_dim), np.random.default_rng(0)
    vqn = VQN({"codebook_size": num_codes, "cql_min_q_weight": 10.0}, obs_dim, action_dim)
    policy, qf = TanhGaussianPolicy(obs_dim, action_dim), FullyConnectedQFunction(obs_dim, action_dim)
    settings = {"use_cql": True, "alpha_multiplier": 1.0, "use_automatic_entropy_tuning": True}
    cql = ConservativeSAC(settings | {"target_entropy": -float(action_dim)}, policy, qf)

    def step(train):
        def update():
            rows = rng.integers(ROWS, size=BATCH)
            jax.block_until_ready(train({key: column[rows] for key, column in data.items()}))

        return update

    return {"vqvae fit": step(vqn.train_vqvae), "saq_cql": step(vqn.train_dqn), "cql": step(cql.train)}


def fql_official_updates(folder, obs_dim, action_dim):
    """FQL and IFQL by their authors, and the ReBRAC beside which they set them, at the sizes of ours."""
    sys.path.insert(0, str(folder))
    import jax
    from agents import fql, ifql, rebrac

    data, rng = random_data(obs_dim, action_dim), np.random.default_rng(0)
    data |= {"masks": 1 - data["dones"], "next_actions": data["actions"]}

    def step(module, kind, layers, turns):
        config = module.get_config()
        config.actor_hidden_dims = config.value_hidden_dims = (256,) * layers
        agent = kind.create(0, data["observations"][:1], data["actions"][:1], config)

        def update():
            nonlocal agent
            rows = rng.integers(ROWS, size=BATCH)
            agent, info = agent.update({key: column[rows] for key, column in data.items()}, **next(turns))
            jax.block_until_ready(info)

        return update

    every_second = itertools.cycle([{"full_update": False}, {"full_update": True}])  # a step moves ReBRAC's policy
    return {
        "fql": step(fql, fql.FQLAgent, 2, itertools.repeat({})),
        "ifql": step(ifql, ifql.IFQLAgent, 2, itertools.repeat({})),
        "rebrac": step(rebrac, rebrac.ReBRACAgent, 3, every_second),
    }


def corl_updates(folder, obs_dim, action_dim):
    """CORL's IQL, TD3+BC, AWAC (three hidden layers, where ours has two) and SPOT."""
    leave_out("gym", "d4rl", "wandb", "pyrallis")
    import torch

    def load(kind, name):
        spec = importlib.util.spec_from_file_location(f"corl_{name}", folder / "algorithms" / kind / f"{name}.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def with_optimizers(**parts):
        """The networks, and an Adam for each, by the names of CORL's arguments."""
        adams = {name: torch.optim.Adam(part.parameters(), 3e-4) for name, part in parts.items()}
        return parts | {f"{name.removesuffix('_network')}_optimizer": adam for name, adam in adams.items()}

    iql, td3_bc, awac = (load("offline", name) for name in ("iql", "td3_bc", "awac"))
    spot = load("finetune", "spot")
    sizes, columns = (obs_dim, action_dim), [torch.as_tensor(c) for c in random_data(obs_dim, action_dim).values()]
    columns[2], columns[4] = columns[2][:, None], columns[4][:, None]  # rewards and dones (N, 1)
    for_iql = with_optimizers(
        actor=iql.GaussianPolicy(*sizes, 1.0), q_network=iql.TwinQ(*sizes), v_network=iql.ValueFunction(obs_dim)
    )
    for_td3 = with_optimizers(
        actor=td3_bc.Actor(*sizes, 1.0), critic_1=td3_bc.Critic(*sizes), critic_2=td3_bc.Critic(*sizes)
    )
    for_awac = with_optimizers(
        actor=awac.Actor(*sizes, 256), critic_1=awac.Critic(*sizes, 256), critic_2=awac.Critic(*sizes, 256)
    )
    for_spot = with_optimizers(
        actor=spot.Actor(*sizes, 1.0),
        critic_1=spot.Critic(*sizes),
        critic_2=spot.Critic(*sizes),
        vae=spot.VAE(*sizes, 2 * action_dim, 1.0),
    )
    learners = {
        "iql": iql.ImplicitQLearning(max_action=1.0, **for_iql).train,
        "td3_bc": td3_bc.TD3_BC(max_action=1.0, **for_td3).train,
        "awac": awac.AdvantageWeightedActorCritic(**for_awac).update,
        "spot": spot.SPOT(max_action=1.0, **for_spot).train,
    }

    def step(learn):
        def update():
            rows = torch.randint(ROWS, (BATCH,))
            learn([column[rows] for column in columns])

        return update

    return {name: step(learn) for name, learn in learners.items()}
