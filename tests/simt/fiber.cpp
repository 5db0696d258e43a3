#include "fiber.h"

#include <cstdint>

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// simt_switch(void** save, void* load): pushes the callee-saved registers, swaps stacks, pops them again.
asm(R"(
.text
.p2align 4
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl simt_switch
.hidden simt_switch
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
#endif

#if defined(__x86_64__) || defined(__aarch64__)
extern "C" void simt_switch(void** save, void* load);
#endif

namespace simt {

void fiber_prepare(Fiber& fiber, void (*entry)()) {
#ifdef SIMT_ASAN
  // An abandoned run may have left this stack's red zones poisoned.
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
  fiber.asan_fake_stack = nullptr;
#endif
#if defined(__x86_64__)
  // As after a call: 16-byte aligned before the return address was pushed. Six registers lie below it.
  auto* top = reinterpret_cast<uintptr_t*>(fiber.stack + fiber.stack_bytes);
  top[-1] = top[-2] = 0;
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = 0;
  fiber.stack_pointer = top - 8;
#elif defined(__aarch64__)
  auto* frame = reinterpret_cast<uintptr_t*>(fiber.stack + fiber.stack_bytes - 160);
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<uintptr_t>(entry);  // x30, where `ret` goes
  fiber.stack_pointer = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

#ifdef SIMT_ASAN
static thread_local Fiber* switched_from = nullptr;  // for its stack's bounds, when it is the host thread's own
#endif

void fiber_started() {
#ifdef SIMT_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (switched_from->stack == nullptr) {
    switched_from->stack = static_cast<char*>(const_cast<void*>(bottom));
    switched_from->stack_bytes = bytes;
  }
#endif
}

void fiber_switch(Fiber& from, Fiber& to, bool from_is_done) {
#ifdef SIMT_ASAN
  switched_from = &from;
  __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);
#else
  (void)from_is_done;
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

}  // namespace simt
