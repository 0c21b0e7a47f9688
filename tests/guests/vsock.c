/* Guest side of test_vsock.py: "listen PORT" echoes one connection to its end, "connect PORT" sends its standard input
 * to the host and prints what comes back. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

static void copy(int from, int to)
{
    static char buffer[65536];
    ssize_t count;
    while ((count = read(from, buffer, sizeof buffer)) > 0)
        for (ssize_t done = 0; done < count;) {
            ssize_t part = write(to, buffer + done, count - done);
            if (part <= 0) { perror("write"); exit(1); }
            done += part;
        }
    if (count < 0) { perror("read"); exit(1); }
}

int main(int argc, char **argv)
{
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_port = atoi(argv[2]) };
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0) { perror("socket"); return 1; }
    if (!strcmp(argv[1], "listen")) {
        address.svm_cid = VMADDR_CID_ANY;
        if (bind(fd, (void *)&address, sizeof address) || listen(fd, 1)) { perror("listen"); return 1; }
        puts("listening");
        fflush(stdout);
        int peer = accept(fd, 0, 0);
        copy(peer, peer);
        close(peer);
    } else {
        address.svm_cid = VMADDR_CID_HOST;
        if (connect(fd, (void *)&address, sizeof address)) { perror("connect"); return 1; }
        copy(0, fd);
        shutdown(fd, SHUT_WR);
        copy(fd, 1);
    }
    return 0;
}
