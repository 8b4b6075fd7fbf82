package PBA::Bench::Archives::Borg;

# PBA::Bench::Archives by BorgBackup, which reads all of the disk's file in each backup. Like ours, its archives are
# neither encrypted nor compressed, and its blocks have 64 KiB.

use v5.36;

use Cwd ();

use parent -norequire, qw(PBA::Bench::Archives);

sub is_installed ($class) {
    return scalar(grep { -x "$_/borg" } split(m/:/, $ENV{PATH}));
}

sub _borg ($self, @arguments) {
    local $ENV{BORG_BASE_DIR} = "$self->{dir}/state";
    local $ENV{BORG_REPO} = "$self->{dir}/repository";
    local $ENV{BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK} = 'yes';
    return $self->program('borg', @arguments);
}

sub begin_anew ($self) {
    $self->SUPER::begin_anew;
    return $self->_borg(qw(init --encryption none));
}

sub backup ($self) {
    my @how = (qw(--compression none --sparse --chunker-params), "fixed,65536");
    return $self->_borg('create', @how, "::$self->{number}", $self->{file});
}

sub lose_bitmap ($self) { return }

sub verify ($self) { return $self->_borg(qw(check --verify-data)) }

# Extracts to the current directory, which is that of a process of its own.
sub restore ($self) {
    my $directory = $self->empty_directory;
    my $before = Cwd::getcwd();
    chdir($directory) or die "$directory: $!\n";
    $self->_borg('extract', '--sparse', "::$self->{number}");
    chdir($before) or die "$before: $!\n";
    return;
}

sub prune ($self) {
    $self->_borg(qw(prune --keep-last 1));
    return $self->_borg('compact');
}

1;
