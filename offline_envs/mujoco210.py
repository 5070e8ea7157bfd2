"""Where today's MuJoCo computes otherwise than 2.1.0, on which D4RL's robots stood, and how to have the old numbers."""

import mujoco
import numpy as np


class Mujoco210:
    """Old weights and old quaternions for a MujocoEnv: `class Hopper(Mujoco210, HopperEnv)`."""

    def _initialize_simulation(self):
        model, data = super()._initialize_simulation()
        weigh_capsules(model, self.fullpath)
        return model, data

    def set_state(self, qpos, qvel):
        """2.1.0 normalises quaternions in place, so that a reset with noise is observed with one of length 1."""
        super().set_state(qpos, qvel)
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)


def weigh_capsules(model, xml_file):
    """Gives a model, made of `xml_file`, the masses and inertias that 2.1.0 computes for it.

    There a capsule of radius r and half length h weighs what a cylinder of half length h + r / 2 does. Since 2.1.1 it
    is its exact volume, which makes hopper 3.6% heavier, walker2d 4.3% and an ant 3.7%. Capsules touch as before."""
    spec = mujoco.MjSpec.from_file(xml_file)
    for number, geom in enumerate(spec.geoms):
        geom.name = geom.name or f"geom {number}"  # by which it is found once compiled
    compiled = spec.compile()
    for geom in spec.geoms:
        same = compiled.geom(geom.name)
        if same.type[0] == mujoco.mjtGeom.mjGEOM_CAPSULE:
            radius, half_length, _ = same.size
            geom.type, geom.size = mujoco.mjtGeom.mjGEOM_CYLINDER, [radius, half_length + radius / 2, 0]
            geom.pos, geom.quat = same.pos, same.quat
            geom.fromto = np.full(6, np.nan)  # where it lies is said by the line above
    twin = spec.compile()
    for part in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, part)[:] = getattr(twin, part)
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what follows from them


def collide_as_before(model):
    """Convex shapes touch by the algorithm that 2.1.0 had; MuJoCo 3.3 has another by default."""
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_NATIVECCD
