import pytest

from kvmd.qemu.accelerator import diagnose, vendor_module

INTEL, AMD, NEITHER = (f"processor : 0\nflags : fpu {flag} sse2\n" for flag in ("vmx", "svm", "tsc"))


@pytest.mark.parametrize(("cpuinfo", "module"), [(INTEL, "kvm_intel"), (AMD, "kvm_amd"), (NEITHER, "")])
def test_vendor_module(cpuinfo: str, module: str) -> None:
    assert vendor_module(cpuinfo) == module


@pytest.mark.parametrize(
    ("cpuinfo", "log", "there", "says"),
    [
        (NEITHER, "", True, "the CPU has neither vmx nor svm"),
        (AMD, "kvm_amd: SVM disabled by BIOS", True, "disabled in the firmware"),
        (NEITHER, "x86/cpu: VMX (outside TXT) disabled by BIOS", True, "disabled in the firmware"),
        (INTEL, "", False, "kvm_intel is missing"),
        (AMD, "", True, "kvm_amd does not load"),
    ],
)
def test_diagnosis(cpuinfo: str, log: str, there: bool, says: str) -> None:
    assert says in diagnose(cpuinfo, log, there)
