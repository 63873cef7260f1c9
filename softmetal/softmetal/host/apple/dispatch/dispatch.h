// Queues and data of libdispatch. On macOS this is the toolchain's own header; elsewhere the few declarations that
// torch's headers and a Metal host file need. As on macOS, Objective-C sees these objects as Objective-C objects, which
// shows in the mangled names of C++ functions that take them.
#pragma once

#ifdef __APPLE__
#include_next <dispatch/dispatch.h>
#else

#include <objc/NSObject.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __OBJC__
@protocol OS_dispatch_object <NSObject>
@end
@protocol OS_dispatch_queue <OS_dispatch_object>
@end
@protocol OS_dispatch_data <OS_dispatch_object>
@end
typedef NSObject<OS_dispatch_object>* dispatch_object_t;
typedef NSObject<OS_dispatch_queue>* dispatch_queue_t;
typedef NSObject<OS_dispatch_data>* dispatch_data_t;
#else
typedef struct dispatch_object_s* dispatch_object_t;
typedef struct dispatch_queue_s* dispatch_queue_t;
typedef struct dispatch_data_s* dispatch_data_t;
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef long dispatch_once_t;
typedef void (*dispatch_function_t)(void* context);
#ifdef __BLOCKS__
typedef void (^dispatch_block_t)(void);
#endif

#define DISPATCH_QUEUE_SERIAL nullptr

#ifdef __BLOCKS__
void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block);
void dispatch_async(dispatch_queue_t queue, dispatch_block_t block);
void dispatch_once(dispatch_once_t* predicate, dispatch_block_t block);
// Copies the bytes where the destructor is DISPATCH_DATA_DESTRUCTOR_DEFAULT.
dispatch_data_t dispatch_data_create(
    const void* bytes,
    size_t size,
    dispatch_queue_t queue,
    dispatch_block_t destructor);
#define DISPATCH_DATA_DESTRUCTOR_DEFAULT ((dispatch_block_t) nullptr)
#endif
void dispatch_sync_f(dispatch_queue_t queue, void* context, dispatch_function_t function);
dispatch_queue_t dispatch_queue_create(const char* label, void* attributes);
size_t dispatch_data_get_size(dispatch_data_t data);
void* dispatch_get_specific(const void* key);
void dispatch_queue_set_specific(
    dispatch_queue_t queue,
    const void* key,
    void* context,
    dispatch_function_t destructor);
#ifdef __OBJC__
#define dispatch_retain(object) ((void)[(object) retain])
#define dispatch_release(object) [(object) release]
#endif

#ifdef __cplusplus
}
#endif

#endif
