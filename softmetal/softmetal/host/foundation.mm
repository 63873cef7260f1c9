// The classes of apple/Foundation/Foundation.h and the queues of libdispatch, as far as the software device needs them.
#import <Foundation/Foundation.h>
#include <dispatch/dispatch.h>
#include <objc/runtime.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unwind.h>
#include <vector>

#include "device.h"

extern "C" {
// A hook of GCC's runtime: what to call for a method that an object does not have.
extern IMP (*__objc_msg_forward2)(id receiver, SEL selector);

// With GCC's runtime, clang lets Objective-C's personality routine unwind Objective-C++, and that one runs neither the
// handlers nor the destructors of C++. Nothing here throws as Objective-C does.
_Unwind_Reason_Code __gxx_personality_v0(
    int version,
    _Unwind_Action actions,
    _Unwind_Exception_Class type,
    _Unwind_Exception* exception,
    _Unwind_Context* context);
_Unwind_Reason_Code __gnu_objc_personality_v0(
    int version,
    _Unwind_Action actions,
    _Unwind_Exception_Class type,
    _Unwind_Exception* exception,
    _Unwind_Context* context) {
  return __gxx_personality_v0(version, actions, type, exception, context);
}
}

// Inline functions in GCC's own header.
Class object_getClass(id object) { return object != nil ? object->isa : Nil; }

namespace {

id missing_method(id receiver, SEL selector, ...) {
  softmetal::misuse(
      std::string(class_getName(object_getClass(receiver))) + " has no method " + sel_getName(selector) +
      " on the software device");
}

[[maybe_unused]] const bool forwards = [] {
  __objc_msg_forward2 = [](id, SEL) { return reinterpret_cast<IMP>(missing_method); };
  return true;
}();

std::mutex live_mutex;

std::unordered_map<const void*, int64_t>& live_counts() {  // by class
  static auto* counts = new std::unordered_map<const void*, int64_t>;
  return *counts;
}

void count_live(Class type, int change) {
  std::lock_guard lock(live_mutex);
  live_counts()[(const void*)type] += change;
}

thread_local std::vector<std::vector<id>> pools;

// Fields of the classes whose interfaces are the frameworks'.

struct Number {
  double floating;
  long long integer;
  bool is_floating;
};

using Array = std::vector<id>;
using Entries = std::vector<std::pair<id, id>>;

struct Error {
  NSString* domain;
  NSInteger code;
  NSDictionary* info;
};

template <typename State>
State& state(NSObject* object) {
  return *static_cast<State*>(object->_state);
}

}  // namespace

std::map<std::string, int64_t> softmetal::live_objects() {
  std::lock_guard lock(live_mutex);
  std::map<std::string, int64_t> named;
  for (const auto& [type, count] : live_counts()) {
    named[class_getName((Class)type)] = count;
  }
  return named;
}

// --- NSObject and autorelease pools ---------------------------------------------------------------------------------

@implementation NSObject
+ (void)load {
}
+ (void)initialize {
}
+ (instancetype)alloc {
  NSObject* object = reinterpret_cast<NSObject*>(class_createInstance(self, 0));
  object->_references = 1;
  count_live(self, 1);
  return object;
}
+ (instancetype)new {
  return [[self alloc] init];
}
+ (Class)class {
  return self;
}
- (instancetype)init {
  return self;
}
- (void)dealloc {
  count_live(object_getClass(self), -1);
  object_dispose(self);
}
- (id)copy {
  return [static_cast<id<NSCopying>>(self) copyWithZone:nil];
}
- (BOOL)isEqual:(id)object {
  return self == object;
}
- (NSUInteger)hash {
  return reinterpret_cast<NSUInteger>(self);
}
- (Class)class {
  return object_getClass(self);
}
- (instancetype)self {
  return self;
}
- (BOOL)isKindOfClass:(Class)type {
  for (Class own = object_getClass(self); own != Nil; own = class_getSuperclass(own)) {
    if (own == type) {
      return YES;
    }
  }
  return NO;
}
- (BOOL)conformsToProtocol:(Protocol*)protocol {
  return class_conformsToProtocol(object_getClass(self), protocol);
}
- (BOOL)respondsToSelector:(SEL)selector {
  return class_respondsToSelector(object_getClass(self), selector);
}
- (instancetype)retain {
  __atomic_add_fetch(&_references, 1, __ATOMIC_RELAXED);
  return self;
}
- (oneway void)release {
  const NSUInteger left = __atomic_sub_fetch(&_references, 1, __ATOMIC_ACQ_REL);
  if (left == 0) {
    [self dealloc];
  }
}
- (instancetype)autorelease {
  if (pools.empty()) {
    softmetal::misuse(
        std::string("an object of class ") + class_getName(object_getClass(self)) +
        " is autoreleased outside of any @autoreleasepool and would never be freed");
  }
  pools.back().push_back(self);
  return self;
}
- (NSUInteger)retainCount {
  return _references;
}
- (NSString*)description {
  return [NSString stringWithUTF8String:class_getName(object_getClass(self))];
}
@end

@implementation NSAutoreleasePool
- (instancetype)init {
  pools.emplace_back();
  _state = reinterpret_cast<void*>(pools.size());
  return self;
}
- (void)drain {
  // Also the pools inside that an exception left behind.
  while (pools.size() >= reinterpret_cast<size_t>(_state)) {
    const std::vector<id> objects = std::move(pools.back());
    pools.pop_back();
    for (id object : objects) {
      [object release];
    }
  }
  [self release];
}
@end

// --- Strings --------------------------------------------------------------------------------------------------------

@implementation NSString
+ (instancetype)stringWithUTF8String:(const char*)bytes {
  return [[[self alloc] initWithUTF8String:bytes] autorelease];
}
- (instancetype)initWithUTF8String:(const char*)bytes {
  return [self initWithBytes:bytes length:strlen(bytes) encoding:NSUTF8StringEncoding];
}
- (instancetype)initWithBytes:(const void*)bytes length:(NSUInteger)length encoding:(NSStringEncoding)encoding {
  _state = new std::string(static_cast<const char*>(bytes), length);
  return self;
}
- (const char*)UTF8String {
  return state<std::string>(self).c_str();
}
- (id)copyWithZone:(NSZone*)zone {
  return [self retain];
}
- (NSUInteger)length {
  return strlen(self.UTF8String);
}
- (BOOL)isEqualToString:(NSString*)other {
  return strcmp(self.UTF8String, other.UTF8String) == 0;
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSString class]] && [self isEqualToString:object];
}
- (NSUInteger)hash {
  return std::hash<std::string>()(self.UTF8String);
}
- (BOOL)hasPrefix:(NSString*)prefix {
  return strncmp(self.UTF8String, prefix.UTF8String, prefix.length) == 0;
}
- (NSString*)description {
  return self;
}
- (void)dealloc {
  delete &state<std::string>(self);
  [super dealloc];
}
@end

@implementation NSConstantString
- (const char*)UTF8String {
  return reinterpret_cast<const char*>(_references);
}
- (instancetype)retain {
  return self;
}
- (oneway void)release {
}
- (instancetype)autorelease {
  return self;
}
@end

// --- Numbers and collections ----------------------------------------------------------------------------------------

static NSNumber* new_number(Number value) {
  NSNumber* number = [[[NSNumber alloc] init] autorelease];
  number->_state = new Number(value);
  return number;
}

static NSNumber* integer_number(long long value) { return new_number({static_cast<double>(value), value, false}); }

@implementation NSNumber
+ (NSNumber*)numberWithBool:(BOOL)value {
  return integer_number(value);
}
+ (NSNumber*)numberWithInt:(int)value {
  return integer_number(value);
}
+ (NSNumber*)numberWithLong:(long)value {
  return integer_number(value);
}
+ (NSNumber*)numberWithUnsignedInt:(unsigned int)value {
  return integer_number(value);
}
+ (NSNumber*)numberWithUnsignedLong:(unsigned long)value {
  return integer_number(static_cast<long long>(value));
}
+ (NSNumber*)numberWithUnsignedInteger:(NSUInteger)value {
  return integer_number(static_cast<long long>(value));
}
+ (NSNumber*)numberWithDouble:(double)value {
  return new_number({value, static_cast<long long>(value), true});
}
- (id)copyWithZone:(NSZone*)zone {
  return [self retain];
}
- (BOOL)boolValue {
  return state<Number>(self).integer != 0;
}
- (int)intValue {
  return static_cast<int>(state<Number>(self).integer);
}
- (long long)longLongValue {
  return state<Number>(self).integer;
}
- (NSUInteger)unsignedIntegerValue {
  return static_cast<NSUInteger>(state<Number>(self).integer);
}
- (double)doubleValue {
  return state<Number>(self).floating;
}
- (NSString*)stringValue {
  const Number& number = state<Number>(self);
  const std::string text = number.is_floating ? std::to_string(number.floating) : std::to_string(number.integer);
  return [NSString stringWithUTF8String:text.c_str()];
}
- (NSString*)description {
  return self.stringValue;
}
- (void)dealloc {
  delete &state<Number>(self);
  [super dealloc];
}
@end

@implementation NSArray
+ (instancetype)arrayWithObjects:(const id[])objects count:(NSUInteger)count {
  NSArray* array = [[self alloc] init];
  array->_state = new Array(objects, objects + count);
  for (id object : state<Array>(array)) {
    [object retain];
  }
  return [array autorelease];
}
- (id)copyWithZone:(NSZone*)zone {
  return [self retain];
}
- (NSUInteger)count {
  return state<Array>(self).size();
}
- (id)objectAtIndex:(NSUInteger)index {
  if (index >= state<Array>(self).size()) {
    softmetal::misuse("index " + std::to_string(index) + " is beyond the end of an NSArray");
  }
  return state<Array>(self)[index];
}
- (id)objectAtIndexedSubscript:(NSUInteger)index {
  return [self objectAtIndex:index];
}
- (BOOL)containsObject:(id)object {
  for (id own : state<Array>(self)) {
    if ([own isEqual:object]) {
      return YES;
    }
  }
  return NO;
}
- (void)dealloc {
  for (id object : state<Array>(self)) {
    [object release];
  }
  delete &state<Array>(self);
  [super dealloc];
}
@end

@implementation NSDictionary
+ (instancetype)alloc {
  NSDictionary* dictionary = [super alloc];
  dictionary->_state = new Entries;
  return dictionary;
}
+ (instancetype)dictionary {
  return [[self new] autorelease];
}
+ (instancetype)dictionaryWithObject:(id)object forKey:(id)key {
  return [self dictionaryWithObjects:&object forKeys:&key count:1];
}
+ (instancetype)dictionaryWithObjects:(const id[])objects forKeys:(const id[])keys count:(NSUInteger)count {
  NSDictionary* dictionary = [self dictionary];
  for (NSUInteger i = 0; i < count; ++i) {
    state<Entries>(dictionary).emplace_back([keys[i] copy], [objects[i] retain]);
  }
  return dictionary;
}
- (id)copyWithZone:(NSZone*)zone {
  NSDictionary* dictionary = [NSDictionary new];
  for (const auto& [key, value] : state<Entries>(self)) {
    state<Entries>(dictionary).emplace_back([key retain], [value retain]);
  }
  return dictionary;
}
- (NSUInteger)count {
  return state<Entries>(self).size();
}
- (NSArray*)allKeys {
  std::vector<id> keys;
  for (const auto& [key, value] : state<Entries>(self)) {
    keys.push_back(key);
  }
  return [NSArray arrayWithObjects:keys.data() count:keys.size()];
}
- (id)objectForKey:(id)key {
  for (const auto& [own, value] : state<Entries>(self)) {
    if ([own isEqual:key]) {
      return value;
    }
  }
  return nil;
}
- (id)objectForKeyedSubscript:(id)key {
  return [self objectForKey:key];
}
- (void)dealloc {
  for (const auto& [key, value] : state<Entries>(self)) {
    [key release];
    [value release];
  }
  delete &state<Entries>(self);
  [super dealloc];
}
@end

@implementation NSMutableDictionary
- (void)setObject:(id)object forKey:(id)key {
  for (auto& [own, value] : state<Entries>(self)) {
    if ([own isEqual:key]) {
      [object retain];
      [value release];
      value = object;
      return;
    }
  }
  state<Entries>(self).emplace_back([key copy], [object retain]);
}
- (void)setObject:(id)object forKeyedSubscript:(id)key {
  [self setObject:object forKey:key];
}
@end

// --- Errors ---------------------------------------------------------------------------------------------------------

NSErrorUserInfoKey const NSLocalizedDescriptionKey = @"NSLocalizedDescription";

@implementation NSError
+ (instancetype)errorWithDomain:(NSErrorDomain)domain code:(NSInteger)code userInfo:(NSDictionary*)info {
  NSError* error = [[self alloc] init];
  error->_state = new Error{[domain copy], code, info != nil ? [info copy] : [NSDictionary new]};
  return [error autorelease];
}
- (id)copyWithZone:(NSZone*)zone {
  return [self retain];
}
- (NSErrorDomain)domain {
  return state<Error>(self).domain;
}
- (NSInteger)code {
  return state<Error>(self).code;
}
- (NSDictionary*)userInfo {
  return state<Error>(self).info;
}
- (NSString*)localizedDescription {
  NSString* text = [self.userInfo objectForKey:NSLocalizedDescriptionKey];
  return text != nil ? text : self.domain;
}
- (void)dealloc {
  [self.domain release];
  [self.userInfo release];
  delete &state<Error>(self);
  [super dealloc];
}
@end

// --- libdispatch ----------------------------------------------------------------------------------------------------

@interface SoftmetalQueue : NSObject <OS_dispatch_queue> {
 @public
  std::mutex* _mutex;
  std::atomic<std::thread::id>* _owner;
}
@end

@implementation SoftmetalQueue
- (instancetype)init {
  _mutex = new std::mutex;
  _owner = new std::atomic<std::thread::id>;
  return self;
}
- (void)dealloc {
  delete _mutex;
  delete _owner;
  [super dealloc];
}
@end

bool softmetal::on_queue(dispatch_queue_t queue) {
  return *static_cast<SoftmetalQueue*>(queue)->_owner == std::this_thread::get_id();
}

dispatch_queue_t dispatch_queue_create(const char* label, void* attributes) { return [SoftmetalQueue new]; }

void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block) {
  if (softmetal::on_queue(queue)) {
    softmetal::misuse("dispatch_sync to the queue that the thread is already on: a deadlock");
  }
  SoftmetalQueue* own = static_cast<SoftmetalQueue*>(queue);
  std::lock_guard lock(*own->_mutex);
  struct Owner {
    std::atomic<std::thread::id>& owner;
    explicit Owner(std::atomic<std::thread::id>& owner) : owner(owner) {
      owner = std::this_thread::get_id();
      softmetal::begin_block();
    }
    ~Owner() { owner = std::thread::id(); }
  } owner(*own->_owner);
  try {
    block();
  } catch (...) {
    softmetal::record_error("a C++ exception leaves a block of dispatch_sync, which ends the process on macOS");
    throw;
  }
}

@interface SoftmetalData : NSObject <OS_dispatch_data> {
 @public
  std::string* _bytes;
}
@end

@implementation SoftmetalData
- (void)dealloc {
  delete _bytes;
  [super dealloc];
}
@end

dispatch_data_t dispatch_data_create(
    const void* bytes,
    size_t size,
    dispatch_queue_t queue,
    dispatch_block_t destructor) {
  SoftmetalData* data = [SoftmetalData new];
  data->_bytes = new std::string(static_cast<const char*>(bytes), size);
  return data;
}

size_t dispatch_data_get_size(dispatch_data_t data) { return static_cast<SoftmetalData*>(data)->_bytes->size(); }

// kernel-builder's generated header names it as the queue on which data is freed.
extern "C" dispatch_queue_t dispatch_get_main_queue() {
  static dispatch_queue_t queue = dispatch_queue_create("main", nullptr);
  return queue;
}

const std::string& softmetal::bytes_of(dispatch_data_t data) { return *static_cast<SoftmetalData*>(data)->_bytes; }
