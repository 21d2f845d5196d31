"""The table of all checks, in the order in which they are shown. A new check is one row."""

from moray.jobs.doctor import cpu, disk, gpu, job, limits, memory, model, ray_cluster, rows, sessions, versions
from moray.jobs.doctor.run import Check

STORE_S = 60.0  # limit of checks that read from a store or the hub

CHECKS = (
    Check("CPU", "processor", cpu.processor),
    Check("CPU", "instructions", cpu.instructions, limit_s=60.0),
    Check("CPU", "rows", rows.same_rows, limit_s=120.0),
    Check("CPU", "load", cpu.load),
    Check("CPU", "compiler", cpu.compiler, limit_s=60.0),
    Check("CPU", "huge pages", cpu.huge_pages),
    Check("CPU", "variables", cpu.variables),
    Check("Memory", "memory", memory.main_memory),
    Check("Memory", "swap", memory.swap),
    Check("Memory", "shared memory", memory.shared_memory),
    Check("Memory", "address space", limits.address_space),
    Check("GPU", "devices", gpu.devices),
    Check("GPU", "torch", gpu.torch_build, limit_s=60.0),
    Check("GPU", "compiler", gpu.kernel_compiler),
    Check("Versions", "python", versions.python),
    Check("Versions", "moray", versions.own_version),
    Check("Versions", "packages", versions.packages),
    Check("Ray", "cluster", ray_cluster.cluster, limit_s=60.0),
    Check("Ray", "other clusters", ray_cluster.neighbours),
    Check("Ray", "old files", sessions.leftovers),
    Check("Ray", "ports", ray_cluster.ports),
    Check("Ray", "open files", limits.open_files),
    Check("Ray", "processes", limits.processes),
    Check("Ray", "variables", ray_cluster.variables),
    Check("Ray", "proxies", ray_cluster.proxies),
    Check("Disk", "Ray's folder", disk.temporary),
    Check("Disk", "temporary", disk.system_temporary),
    Check("Disk", "downloads", disk.downloads),
    Check("Job", "input", job.source, limit_s=STORE_S),
    Check("Job", "model", model.checkpoint, limit_s=STORE_S),
    Check("Job", "model's room", model.room, limit_s=STORE_S),
    Check("Job", "download", model.download, limit_s=STORE_S),
    Check("Job", "output", job.output, limit_s=STORE_S),
    Check("Job", "credentials", job.credentials),
    Check("Job", "plan", job.plan, limit_s=STORE_S),
)
