"""The samplers of diffusion models: one table, that the command line and the families read. It imports nothing."""

# Name -> scheduler of diffusers, and its settings. Samples are not clipped to [-1, 1], and PNDM's first steps are left
# out as Stable Diffusion does.
SAMPLERS: dict[str, tuple[str, dict[str, bool | str]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    # On pixels, steps equal in time end where much noise is left: what comes out is duller than the data.
    "dpmsolver++_logsnr": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    # Of models that are distilled to few steps, which must begin at the last timestep.
    "ddim_trailing": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler_ancestral_trailing": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {}),
    # Of models of rectified flow, and theirs alone.
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_dpmsolver++": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ),
}
