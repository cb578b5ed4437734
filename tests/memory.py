"""The peak memory of a process, for programs that tests start."""

PEAK = '''
import resource, sys
def peak():
    """The most memory that this process had at once, in MB."""
    if sys.platform == "linux":  # ru_maxrss would begin with the size of the parent
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
'''
