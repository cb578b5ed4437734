"""The machine code of Triton's kernels, for tests."""


def machine_code(kernel, types: dict[str, str], constants: dict, warps: int, **options) -> str:
    """What a kernel becomes for compute capability 9.0; compiling needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): aligned for i, n in enumerate(names) if types.get(n, "").startswith("*")},
    )
    options |= {"num_warps": warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["sass"]
