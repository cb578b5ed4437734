// Launches the kernel: all fibers take turns until all have ended.

static const Network* argument;

static void run_fiber() {
  one_token(*argument);
  now->ended = true;
  give_way();
}

// Until it gives way.
__attribute__((noinline)) static void run(Fiber* fiber) {
  now = fiber;
  if (_setjmp(scheduler)) return;
  if (fiber->begun) _longjmp(fiber->place, 1);
  fiber->begun = true;
  setcontext(&fiber->context);
}

extern "C" void launch(const Network* network) {
  constexpr int COUNT = BLOCKS * IN_BLOCK;
  argument = network;
  fibers = std::vector<Fiber>(COUNT);
  of_block.assign(BLOCKS, {}), of_computing.assign(BLOCKS, {}), of_warp.assign(COUNT / 32, {});
  given.assign(COUNT, 0);
  memories.assign(BLOCKS, std::vector<unsigned char>(sizeof(Shared) + 128));
  for (int i = 0; i < COUNT; i++) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(1 << 16), fiber.thread = i % IN_BLOCK, fiber.block = i / IN_BLOCK;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (Fiber& fiber : fibers)
      if (!fiber.ended) running = true, run(&fiber);
  }
}
