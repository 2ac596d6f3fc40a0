// For functions of which all has to be inlined: what is passed to a function, such as pairs of
// registers or a counter that a function moves on, travels through memory. Under sanitizers nobody
// waits for that, and it would compile for minutes.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DYNQUANT_FLATTEN
#else
#define DYNQUANT_FLATTEN [[gnu::flatten]]
#endif
