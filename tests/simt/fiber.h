// A fiber: a stack and the place where it stopped. Switching costs a few nanoseconds where there is an assembly
// version (x86-64, AArch64) and goes through ucontext elsewhere.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
#if defined(__x86_64__) || defined(__aarch64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;  // lowest address; null for the host thread's own stack
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
};

// Makes `fiber`, whose stack is set, start in entry() when it is switched to. entry must never return.
void fiber_prepare(Fiber& fiber, void (*entry)());

// Stops `from` (the running fiber) and continues `to`. `from_is_done` promises that nobody switches to it again.
void fiber_switch(Fiber& from, Fiber& to, bool from_is_done = false);

// The first thing entry() has to call.
void fiber_started();

}  // namespace simt
