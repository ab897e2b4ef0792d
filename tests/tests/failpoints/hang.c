// Loaded into an engine (LD_PRELOAD), this makes threads of it hang, as one does that waits for a device which does not answer, while all
// others go on.
//
// The file that HANG names holds the name of the threads. The engine that has such threads renames it to end in `.done`; they hang for as
// long as that is there.
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static char plan[4096], done[4096];

static void hang(int number) {
    (void)number;
    while (!access(done, F_OK)) usleep(1000);
}

// Calls `act` for each thread of this name, and says whether there is one.
static int each(const char *name, void (*act)(pid_t)) {
    DIR *tasks = opendir("/proc/self/task");
    struct dirent *task;
    int found = 0;
    while (tasks && (task = readdir(tasks))) {
        char path[512], comm[64] = "";
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", task->d_name);
        FILE *file = fopen(path, "r");
        if (file && fgets(comm, sizeof comm, file)) comm[strcspn(comm, "\n")] = 0;
        if (file) fclose(file);
        if (strcmp(comm, name)) continue;
        found = 1;
        if (act) act(atoi(task->d_name));
    }
    if (tasks) closedir(tasks);
    return found;
}

static void stop(pid_t thread) { syscall(SYS_tgkill, getpid(), thread, SIGUSR2); }

static void *wait_for_plan(void *nothing) {
    for (;; usleep(10000)) {
        char name[64] = "";
        FILE *file = fopen(plan, "r");
        if (!file) continue;
        if (fgets(name, sizeof name, file)) name[strcspn(name, "\n")] = 0;
        fclose(file);
        if (*name && each(name, NULL) && !rename(plan, done)) each(name, stop);
    }
    return nothing;
}

__attribute__((constructor)) static void begin(void) {
    char line[4096] = "";
    FILE *file = fopen("/proc/self/cmdline", "r");
    size_t length = file ? fread(line, 1, sizeof line - 1, file) : 0;
    if (file) fclose(file);
    // The first argument after the program's name is the command.
    const char *command = line + strlen(line) + 1, *named = getenv("HANG");
    if (!named || command >= line + length || strcmp(command, "engine")) return;
    snprintf(plan, sizeof plan, "%s", named);
    snprintf(done, sizeof done, "%s.done", named);
    struct sigaction action = {.sa_handler = hang, .sa_flags = SA_RESTART};
    sigaction(SIGUSR2, &action, NULL);
    pthread_t thread;
    pthread_create(&thread, NULL, wait_for_plan, NULL);
}
